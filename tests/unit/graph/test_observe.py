"""What observers see, and gradients against a Jacobian written out."""

from collections.abc import Callable, Sequence

import pytest
import torch
from small_vits import SIZE, Noise, node_of, traced
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from martlet.core.technique import silent
from martlet.graph import observe as module
from martlet.graph.observe import MICRO_BATCH, observe, observe_calls, observe_gradients
from martlet.graph.sites import aten
from martlet.graph.trace import trace


class Images:
    """Batches of given sizes."""

    def __init__(self, images: Tensor, sizes: Sequence[int]) -> None:
        assert sum(sizes) == len(images)
        self.images, self.sizes, self.num_images = images, sizes, len(images)

    def __iter__(self):
        yield from self.images.split(list(self.sizes))


class Small(nn.Module):
    """24 values, a curve, three logits; and a branch that leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.aside = nn.Linear(12, 6), nn.Linear(12, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.before(x.flatten(2)[..., :12].mean(1, keepdim=True).repeat(1, 2, 1)))  # (B, 2, 6)
        return self.after(hidden.flatten(1)) + 0 * self.aside(hidden.detach()).sum((1, 2))[:, None]


@pytest.fixture(scope="module")
def small() -> GraphModule:
    torch.manual_seed(0)
    return trace(Small(), (4, 4)).requires_grad_(False)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many draws in few passes."""
    monkeypatch.setattr(module, "MICRO_BATCH", 1000)


def tanh(graph_module: GraphModule) -> Node:
    return next(node for node in graph_module.graph.nodes if node.target is aten.tanh.default)


def jacobian(graph_module: GraphModule) -> Tensor:
    """d logits / d hidden: the weights of the Linear after, (3, 2, 6), whatever the image."""
    return graph_module.get_parameter("after.weight").detach().reshape(3, 2, 6)


Observer = Callable[..., None]


def squares(graph_module: GraphModule, observer: Observer, n: int) -> Tensor:
    """Mean over n images of the squared gradients of the hidden tensor."""
    seen: list[Tensor] = []
    images = Images(torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1)), [n])
    watch = [([tanh(graph_module)], lambda values, gradients: seen.append(gradients[0]))]
    observer(graph_module, images, watch, 0, silent, "test")
    return torch.cat(seen).square().mean(0)


def assert_is_hutchinsons(graph_module: GraphModule, observer: Observer) -> None:
    """E[(r · J)²] is the sum of squares over the logits, and each draw is one of the 2³ combinations of signs."""
    expected = jacobian(graph_module).square().sum(0)  # (2, 6)
    torch.testing.assert_close(squares(graph_module, observer, 2000), expected, rtol=0.12, atol=0.004)


@pytest.mark.usefixtures("at_once")
def test_squared_gradients_are_those_of_the_jacobian(small):
    assert_is_hutchinsons(small, observe_gradients)


def without_signs(graph_module, images, watch, seed, progress, what):
    """The gradients of the sum of the logits."""
    for _, look in watch:
        look([], [jacobian(graph_module).sum(0).expand(images.num_images, 2, 6)])


def with_signs_drawn_once(graph_module, images, watch, seed, progress, what):
    signs = torch.randint(2, (3,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    for _, look in watch:
        look([], [torch.einsum("k,knc->nc", signs, jacobian(graph_module)).expand(images.num_images, 2, 6)])


def of_the_first_logit(graph_module, images, watch, seed, progress, what):
    for _, look in watch:
        look([], [jacobian(graph_module)[:1].expand(images.num_images, 2, 6)])


@pytest.mark.parametrize("fault", [without_signs, with_signs_drawn_once, of_the_first_logit])
def test_a_fault_in_the_gradients_shows(small, fault):
    with pytest.raises(AssertionError):
        assert_is_hutchinsons(small, fault)


def test_each_image_draws_its_own_signs(small):
    seen: list[Tensor] = []
    images = Images(torch.randn(40, 3, 4, 4), [40])
    look = [([tanh(small)], lambda values, gradients: seen.append(gradients[0]))]
    observe_gradients(small, images, look, 0, silent, "test")
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)  # (8, 3)
    possible = torch.einsum("sk,knc->snc", signs, jacobian(small)).flatten(1)  # (8, 12)
    distance = (torch.cat(seen).flatten(1)[:, None] - possible).abs().amax(2)  # (40, 8)
    assert distance.amin(1).max() < 1e-5
    assert set(distance.argmin(1).tolist()) == set(range(8))


@pytest.mark.usefixtures("at_once")
def test_the_cost_of_an_error_is_what_it_costs():
    """On a real attention: the mean of (r · J e)² over draws is |logits(x + e) - logits(x)|² for a small e."""
    graph_module = traced("registers and qk-norm").double()
    qkv = node_of(graph_module, "blocks.0.attn.qkv.weight")
    n, generator = 3000, torch.Generator().manual_seed(2)
    image = torch.randn(1, 3, *SIZE, generator=generator, dtype=torch.float64)
    shape = [1, 4 + 1 + 2, 36]  # patches, class token, registers; q, k and v
    small_error = 1e-4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    estimates: list[Tensor] = []
    misplaced: list[Tensor] = []

    def look(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        estimates.append((gradients[0] * small_error).sum((1, 2)).square())
        misplaced.append((gradients[0].roll(1, 2) * small_error).sum((1, 2)).square())

    observe_gradients(graph_module, Images(image.repeat(n, 1, 1, 1), [n]), [([qkv], look)], 0, silent, "test")
    before = graph_module(image)[0]
    graph_module.register_buffer("small_error", small_error)
    with graph_module.graph.inserting_after(qkv):
        getter = graph_module.graph.get_attr("small_error")
    with graph_module.graph.inserting_after(getter):
        added = graph_module.graph.call_function(torch.add, (qkv, getter))
    for user in list(qkv.users):
        if user is not added:
            user.replace_input_with(qkv, added)
    graph_module.recompile()
    cost = (graph_module(image)[0] - before).square().sum().item()
    assert torch.cat(estimates).mean().item() == pytest.approx(cost, rel=0.1)
    assert torch.cat(misplaced).mean().item() != pytest.approx(cost, rel=0.1)


def test_values_and_gradients_come_in_the_order_asked_for_and_in_small_parts(small):
    """Also of the image itself; what leads to no logit has gradient 0."""
    hidden, [image] = tanh(small), [n for n in small.graph.nodes if n.op == "placeholder"]
    aside = node_of(small, "aside.weight")
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    shown: list[tuple[str, int, int]] = []
    images = Images(torch.randn(9, 3, 4, 4), [6, 3])
    watch = [([hidden, image, aside], lambda values, gradients: seen.append((list(values), list(gradients))))]
    observe_gradients(small, images, watch, 0, lambda *said: shown.append(said), "look")
    assert [len(values[0]) for values, _ in seen] == [MICRO_BATCH, 2, 3]
    assert shown == [("look", 6, 9), ("look", 9, 9)]
    for values, gradients in seen:
        assert [value.shape[1:] for value in values] == [(2, 6), (3, 4, 4), (2, 2)]
        assert [g.shape for g in gradients] == [v.shape for v in values]
        assert not any(value.requires_grad for value in values)
        assert gradients[1].abs().max() > 0
        assert gradients[2].abs().max() == 0
    assert torch.equal(torch.cat([values[1] for values, _ in seen]), images.images)


def test_the_same_seed_gives_the_same_gradients(small):
    def run(seed: int) -> Tensor:
        seen: list[Tensor] = []
        look = [([tanh(small)], lambda values, gradients: seen.append(gradients[0]))]
        observe_gradients(small, Images(torch.ones(8, 3, 4, 4), [8]), look, seed, silent, "test")
        return torch.cat(seen)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_gradients_leave_the_graph_as_it_was():
    graph_module = traced("no class token")
    start = {k: v.clone() for k, v in graph_module.state_dict().items()}
    gelu = next(node for node in graph_module.graph.nodes if node.target is aten.gelu.default)
    observe_gradients(graph_module, Noise(), [([gelu], lambda values, gradients: None)], 0, silent, "test")
    assert all(torch.equal(value, start[name]) for name, value in graph_module.state_dict().items())
    assert all(parameter.grad is None for parameter in graph_module.parameters())


def test_observers_see_each_batch_as_the_layer_gives_it(small):
    images = Images(torch.randn(5, 3, 4, 4), [3, 2])
    hidden, shown, seen, calls = tanh(small), [], [], []
    observe(small, images, {hidden: seen.append}, lambda *said: shown.append(said), "look")
    after = node_of(small, "after.weight")
    observe_calls(small, images, {after: lambda *all_of_it: calls.append(all_of_it)}, silent, "look")
    assert shown == [("look", 3, 5), ("look", 5, 5)]
    pooled = images.images.flatten(2)[..., :12].mean(1, keepdim=True).repeat(1, 2, 1)
    weight, bias = small.get_parameter("before.weight"), small.get_parameter("before.bias")
    torch.testing.assert_close(torch.cat(seen), torch.tanh(pooled @ weight.T + bias))
    assert [len(value) for value in seen] == [3, 2]
    for (value, x, w, b), hidden_value in zip(calls, seen, strict=True):
        assert torch.equal(x, hidden_value.flatten(1))
        torch.testing.assert_close(value, x @ w.T + b)
        assert not value.requires_grad
