"""Learned rounding and scales, against autograd in float64 and on small models."""

import copy

import pytest
import torch
from small_vits import MODELS, SIZE, error, logits, traced
from torch import Tensor
from torch.fx import GraphModule

from martlet.core.errors import ArtifactError
from martlet.core.kept import Kept
from martlet.core.technique import silent
from martlet.functional.quantize.packing import unpack
from martlet.functional.quantize.table import tabulate
from martlet.functional.quantize.twin import TwinGeluGrid
from martlet.graph import rounding
from martlet.graph.fit import fit
from martlet.graph.objectives import Block, mean_squared
from martlet.graph.reconstruct import Learning, reconstruct_
from martlet.graph.sites import sites
from martlet.nn.quantizers import ActivationQuantizer, PackedWeightQuantizer, TableQuantizer
from martlet.nn.straight_through import LearnedScale, Passing
from martlet.techniques.quantize.uniform import Uniform

IMAGES = torch.randn(16, 3, *SIZE, generator=torch.Generator().manual_seed(3))
FAST = Learning(steps=60, weight_rate=0.03)


def rounded(original: GraphModule, bits: int = 4) -> GraphModule:
    twin = copy.deepcopy(original)
    technique = Uniform(weight_bits=bits, activation_bits=bits)
    found = fit(twin, list(sites(twin)), IMAGES, technique.decide, True, silent)
    rounding.insert_(twin, found.activations, found.weights)
    return twin


def weights(graph_module: GraphModule) -> dict[str, PackedWeightQuantizer]:
    return {n: m for n, m in graph_module.named_modules() if isinstance(m, PackedWeightQuantizer)}


def straight_through(x: Tensor, quantizer: TableQuantizer, factor: Tensor) -> Tensor:
    """In the words of autograd: rounding adds a constant inside the table, and outside there is only a constant."""
    scale, offset = quantizer.along(quantizer.scale.double() * factor, x), quantizer.along(quantizer.offset, x).double()
    position = x / scale + offset
    value = quantizer.look_up(position.detach().float()).double()
    low, high = (0, 2**quantizer.bits - 1) if quantizer.values is None else quantizer.values[[0, -1]].tolist()
    inside = (position >= low) & (position <= high)
    return (torch.where(inside, position + (value - position).detach(), value) - offset) * scale


@pytest.mark.parametrize("kind", ["tensor", "heads", "table"])
def test_gradients_of_a_learned_scale(kind):
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    if kind == "table":
        quantizer = TableQuantizer(4, torch.tensor(1.3), torch.zeros(()), table=tabulate(TwinGeluGrid(4, 2)))
    else:
        scale = torch.tensor(0.2) if kind == "tensor" else torch.tensor([0.1, 0.2, 0.3])
        quantizer = TableQuantizer(4, scale, torch.full_like(scale, 7.0))
    layer = LearnedScale(quantizer)
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    mine = x.clone().requires_grad_()
    (layer(mine) * probe).sum().backward()
    theirs, factor = x.double().requires_grad_(), torch.ones_like(quantizer.scale.double()).requires_grad_()
    expected = straight_through(theirs, quantizer, factor)
    (expected * probe).sum().backward()
    torch.testing.assert_close(layer(x).double(), expected.detach(), atol=1e-6, rtol=1e-5)
    assert mine.grad is not None
    assert theirs.grad is not None
    assert factor.grad is not None
    torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.factor.grad.double(), factor.grad, atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]
    assert 0 < (mine.grad == 0).sum() < x.numel()  # some lie outside the table
    assert factor.grad.abs().min() > 1e-3


@pytest.mark.parametrize("name", list(MODELS))
def test_blocks_come_closer_to_what_they_gave(name):
    original = traced(name)
    learned = rounded(original)
    with torch.no_grad():
        exact, before, start = original(IMAGES), learned(IMAGES), copy.deepcopy(weights(learned))
    report = reconstruct_(learned, original, IMAGES, mean_squared, FAST, 0, silent)
    with torch.no_grad():
        assert error(exact, learned(IMAGES)) < error(exact, before)
    assert sum(r["after"] for r in report) < 0.9 * sum(r["before"] for r in report)
    moved = 0
    for key, quantizer in weights(learned).items():
        old, new = (unpack(q.codes, q.bits, q.columns).int() for q in (start[key], quantizer))
        assert (new - old).abs().max() <= 1  # up or down, nothing else
        moved += int((new != old).sum())
        assert torch.equal(quantizer.scale, start[key].scale)
    assert moved > 0


def test_it_is_the_same_again_with_the_same_seed():
    original = traced("class token")
    results = []
    for seed in (0, 0, 1):
        learned = rounded(original)
        reconstruct_(learned, original, IMAGES, mean_squared, FAST, seed, silent)
        results.append(logits(learned))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_an_objective_gets_the_float_block_and_what_follows_it():
    original = traced("class token")
    seen: list[Block] = []

    def objective(block: Block):
        seen.append(block)
        return mean_squared(block)

    reconstruct_(rounded(original), original, IMAGES, objective, Learning(steps=1), 0, silent)
    assert [block.rest is None for block in seen] == [False, False, True]
    with torch.no_grad():
        expected = original(IMAGES)
        for block in seen:
            torch.testing.assert_close(block.rest(block.output) if block.rest else block.output, expected)


def test_a_float_graph_has_nothing_to_learn():
    original = traced("class token")
    twin = copy.deepcopy(original)
    report = reconstruct_(twin, original, IMAGES, mean_squared, FAST, 0, silent)
    assert all(r == {"before": 0.0, "after": 0.0} for r in report)
    assert torch.equal(logits(twin), logits(original))


class _StoppedError(Exception):
    pass


def test_a_stopped_run_goes_on_where_it_was(tmp_path) -> None:
    """To the same bits, and without learning again what was done."""
    original = traced("class token")
    whole = rounded(original)
    expected = reconstruct_(whole, original, IMAGES, mean_squared, FAST, 3, silent)
    kept = Kept(tmp_path / "kept")

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        reconstruct_(rounded(original), original, IMAGES, mean_squared, FAST, 3, stop, kept=kept)
    assert len(list(kept.folder.iterdir())) == 1
    asked: list[Block] = []

    def mean_squared_again(block: Block):
        asked.append(block)
        return mean_squared(block)

    mean_squared_again.__name__ = mean_squared.__name__
    learned = rounded(original)
    report = reconstruct_(learned, original, IMAGES, mean_squared_again, FAST, 3, silent, kept=kept)
    assert report == expected
    assert len(asked) == len(expected) - 2
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), learned.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("change", ["seed", "images", "learning"])
def test_what_another_run_kept_is_not_taken(tmp_path, change: str) -> None:
    original, kept = traced("class token"), Kept(tmp_path / "kept")
    quick = Learning(steps=1)
    reconstruct_(rounded(original), original, IMAGES, mean_squared, quick, 3, silent, kept=kept)
    images = IMAGES + 1 if change == "images" else IMAGES
    learning = Learning(steps=2) if change == "learning" else quick
    reconstruct_(rounded(original), original, images, mean_squared, learning, 3 + (change == "seed"), silent, kept=kept)
    assert len(list(kept.folder.iterdir())) == 2


def test_damaged_work_is_one_clear_error(tmp_path) -> None:
    original, kept = traced("class token"), Kept(tmp_path / "kept")
    reconstruct_(rounded(original), original, IMAGES, mean_squared, Learning(steps=1), 3, silent, kept=kept)
    [file] = kept.folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"is damaged; delete .*kept to begin anew"):
        reconstruct_(rounded(original), original, IMAGES, mean_squared, Learning(steps=1), 3, silent, kept=kept)


def test_grids_of_eight_bits_let_gradients_pass() -> None:
    """Else only what comes after the last of them would learn."""
    quantizer = ActivationQuantizer(torch.tensor(0.01), torch.tensor(100, dtype=torch.uint8))
    x = torch.tensor([-1.5, -0.5, 0.003, 1.2, 3.0], requires_grad=True)
    y = Passing(quantizer)(x)
    assert torch.equal(y, quantizer(x))
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
