"""Layer-wise relevance propagation (arXiv 2012.09838): its rules in plain Python, and what a whole graph conserves."""

import pytest
import torch
from timm import create_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core.errors import UsageError
from martlet.core.technique import silent
from martlet.functional.relevance import through_mean, through_product, through_sum
from martlet.graph.relevance import layer_relevance, propagate
from martlet.graph.segments import blocks
from martlet.graph.sites import sites
from martlet.graph.trace import trace


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def oracle_product(x: list[list[float]], w: list[list[float]], r: list[list[float]]) -> list[list[float]]:
    """Equation 7 for y_i = Σ_j x_j w_ij: the relevance of each x_j. w (O, I)."""
    found = [[0.0] * len(row) for row in x]
    for n, row in enumerate(x):
        for i, weights in enumerate(w):
            parts = [a * b for a, b in zip(row, weights, strict=True)]
            signed = [p for p in parts if p > 0] or [p for p in parts if p < 0]
            for j, part in enumerate(parts):
                if signed and part * signed[0] > 0:
                    found[n][j] += part / sum(signed) * r[n][i]
    return found


def assert_is_the_papers(function) -> None:
    x, w = draw(4, 6), draw(5, 6, seed=1)
    x[2] = x[2].abs()
    w[3] = -w[3].abs()  # an output without a positive part
    r = draw(4, 5, seed=2).abs()
    found = function(lambda a, b: a @ b.T, x, w, r)
    expected = oracle_product(x.tolist(), w.tolist(), r.tolist())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_a_linears_relevance_is_the_papers() -> None:
    assert_is_the_papers(through_product)


@pytest.mark.parametrize(
    "fault",
    [
        lambda f, x, w, r: through_product(f, x, w.abs(), r),
        lambda f, x, w, r: through_product(f, x, -w, r),
        lambda f, x, w, r: x * ((r / f(x, w)) @ w),  # the signed sum, without a rule for signs
        lambda f, x, w, r: torch.full_like(x, float(r.sum()) / x.numel()),  # which conserves as well
    ],
)
def test_a_fault_in_it_shows(fault) -> None:
    with pytest.raises(AssertionError):
        assert_is_the_papers(fault)


def test_every_rule_conserves_relevance() -> None:
    r = draw(2, 8, 5, 5).abs()
    conv = lambda a, b: nn.functional.conv2d(a, b, stride=2, padding=1, groups=2)  # noqa: E731
    x, w = draw(2, 4, 9, 9, seed=1), draw(8, 2, 3, 3, seed=2)
    assert float(through_product(conv, x, w, r).sum()) == pytest.approx(float(r.sum()), rel=1e-9)
    a, b = through_sum(draw(2, 8, 5, 5, seed=3), draw(8, 1, 1, seed=4), r)
    assert float(a.sum() + b.sum()) == pytest.approx(float(r.sum()), rel=1e-9)
    assert a.shape == r.shape
    assert b.shape == (8, 1, 1)
    pooled = through_mean(lambda t: t.mean((2, 3)), draw(2, 8, 5, 5, seed=5), r[:, :, 0, 0])
    assert float(pooled.sum()) == pytest.approx(float(r[:, :, 0, 0].sum()), rel=1e-9)
    assert all(float(part.min()) >= 0 for part in (a, b, pooled))


def test_terms_share_by_their_size() -> None:
    a, b = through_sum(torch.tensor([3.0, -1.0, 0.0]), torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([8.0, 2.0, 6.0]))
    assert a.tolist() == [6.0, 2.0, 3.0]
    assert b.tolist() == [2.0, 0.0, 3.0]


MODELS = {
    "class token, register": lambda: vit(reg_tokens=1, qk_norm=True),
    "no class token, odd depth": lambda: vit(class_token=False, global_pool="avg", depth=3),
    "windows": lambda: SwinTransformer(
        img_size=32, patch_size=4, embed_dim=24, depths=(2, 1), num_heads=(2, 3), window_size=4, num_classes=5
    ),
    "hybrid": lambda: create_model("mobilevit_xxs", num_classes=5),
}


def vit(**settings: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**(sizes | settings))  # type: ignore[arg-type]


def traced(name: str) -> GraphModule:
    """With every parameter random, so that no bias is 0 and no scale 1."""
    torch.manual_seed(0)
    module = MODELS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return trace(module.eval(), (64, 64) if name == "hybrid" else (32, 32))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("hybrid", "windows") else n for n in MODELS]
)
def test_layers_of_a_model_conserve_the_logit(name: str) -> None:
    graph = traced(name)
    x = draw(2, 3, *((64, 64) if name == "hybrid" else (32, 32))).float()
    found = propagate(graph, x)
    pieces = blocks(graph)
    assert len(pieces) > 2
    for cut in (piece.output for piece in pieces[1:]):  # the first ends before a class token comes in
        assert float(found[cut].sum()) == pytest.approx(len(x), rel=0.05)
    leaves = [node for node in found if node.op in ("placeholder", "get_attr")]
    assert sum(float(found[leaf].sum()) for leaf in leaves) == pytest.approx(len(x), rel=0.05)
    assert all(float(relevance.min()) >= -1e-6 for relevance in found.values())
    shares = layer_relevance(graph, list(sites(graph)), x, silent)
    assert all(0 < share <= 1.001 for share in shares.values())
    by_name = {site.name: shares[site.node] for site in sites(graph)}
    assert by_name.get("head", by_name.get("head.fc")) == pytest.approx(1, rel=1e-3)
    assert min(shares.values()) < 0.9  # a residual takes its share


def test_it_is_about_the_class_that_is_predicted() -> None:
    """A feature that alone decides has all the relevance, and so has the branch that it comes through."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(12, 9), nn.Linear(12, 9), nn.Linear(9, 2)
            with torch.no_grad():
                self.second.weight.zero_()
                self.second.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.head(torch.relu(self.first(x)) + torch.relu(self.second(x)))

    torch.manual_seed(1)
    graph = trace(Two().eval(), (2, 2))
    shares = layer_relevance(graph, list(sites(graph)), torch.randn(4, 3, 2, 2), silent)
    by_name = {site.name: shares[site.node] for site in sites(graph)}
    assert by_name["first"] == pytest.approx(1, rel=1e-4)
    assert by_name["second"] == pytest.approx(0, abs=1e-4)


def test_an_operation_without_a_rule_is_one_clear_error() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1).topk(6).values)

    graph = trace(Sorted().eval(), (2, 2))
    with pytest.raises(
        UsageError, match=r"^no rule for the relevance of aten\.topk\.default at topk; take allocation:"
    ):
        propagate(graph, torch.randn(1, 3, 2, 2))
