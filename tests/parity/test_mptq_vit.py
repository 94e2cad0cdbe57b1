"""MPTQ-ViT (arXiv 2401.14895): OPT-m's search in plain Python and float64, and what it and SQ-b are for."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from martlet.core.errors import RecipeError
from martlet.core.technique import Context
from martlet.functional.quantize.scale_ratio import COVERED, RATIOS, RatioGrid, search_ratio
from martlet.functional.quantize.search import linear_error, squared_error
from martlet.graph.trace import trace
from martlet.techniques.quantize.mptq_vit import MPTQViT

BITS = 4


def gelu(seed: int = 0, spread: float = 2.0, n: int = 500) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.gelu(torch.randn(n, generator=generator).double() * spread)


def on_grid(x: float, step: float, m: int) -> float:
    """Signed integers, a step for the negative ones and 2^m times it for the others."""
    half = 2 ** (BITS - 1)
    if x < 0:
        return max(round(x / step), -half) * step
    return min(round(x / (step * 2**m)), half - 1) * step * 2**m


def oracle(x: list[float]) -> tuple[int, float]:
    """The ratio and the step, of all that are tried, with the least squared error."""
    best = (float("inf"), 0, 0.0)
    for m in range(9):
        for sixteenths in range(16, 1, -1):
            step = max(x) * sixteenths / 16 / (2 ** (BITS - 1) - 1) / 2**m
            error = sum((on_grid(v, step, m) - v) ** 2 for v in x)
            if error < best[0] * (1 - 1e-12):
                best = (error, m, step)
    return best[1], best[2]


def assert_is_the_search(function, spread: float) -> None:
    x = gelu(spread=spread)
    grid = function(squared_error(x), x, BITS)
    m, step = oracle(x.tolist())
    assert (grid.bits, grid.exponent) == (BITS, m)
    assert grid.fine == pytest.approx(step)
    values = grid.dequantize(grid.quantize(x), torch.float64).tolist()
    assert values == pytest.approx([on_grid(v, step, m) for v in x.tolist()], abs=1e-6)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0, 6.0])
def test_the_ratio_is_the_one_of_least_error(spread: float) -> None:
    assert_is_the_search(search_ratio, spread)


@pytest.mark.parametrize(
    "fault",
    [
        lambda e, x, bits: search_ratio(e, x, bits, range(2)),
        lambda e, x, bits: search_ratio(e, x, bits + 1),
        lambda e, x, bits: search_ratio(squared_error(x * 0 + 1), x, bits),
        lambda e, x, bits: RatioGrid(bits, 3, search_ratio(e, x, bits).fine * 1.01),
    ],
)
def test_a_fault_in_the_search_shows(fault) -> None:
    with pytest.raises(AssertionError):
        assert_is_the_search(fault, 6.0)


def test_a_searched_ratio_beats_every_fixed_one() -> None:
    """Over layers of different spreads, on values it was not chosen on, by what the Linear behind gives."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 32, generator=generator).double()
    totals = dict.fromkeys(["searched", *RATIOS], 0.0)
    for layer, spread in enumerate((0.2, 0.6, 1.5, 4.0, 12.0)):
        chosen_on, others = (gelu(seed, spread, 3200).reshape(100, 32) for seed in (layer, layer + 50))
        size = float((others @ weight.T).square().mean())
        for name in totals:
            ratios = RATIOS if name == "searched" else (int(name),)
            grid = search_ratio(linear_error(chosen_on, weight), chosen_on, BITS, ratios)
            rounded = grid.dequantize(grid.quantize(others), torch.float64)
            totals[name] += linear_error(others, weight)(rounded) / size
    assert totals["searched"] < min(total for name, total in totals.items() if name != "searched")


def test_the_whole_positive_range_is_among_the_candidates() -> None:
    x = torch.tensor([-0.1, 0.2, 7.0])
    grid = search_ratio(lambda rounded: float((rounded[2] - 7.0).abs()), x, BITS)
    assert COVERED[0] == 1.0
    assert grid.coarse * (2 ** (BITS - 1) - 1) == pytest.approx(7.0)


def test_what_has_no_positive_value_is_refused() -> None:
    x = torch.tensor([-0.1, 0.0])
    with pytest.raises(ValueError, match="a GELU's is positive"):
        search_ratio(squared_error(x), x, BITS)
    with pytest.raises(ValueError, match="has to be positive"):
        RatioGrid(BITS, 1, 0.0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sq_b_folds_with_equal_logits(alpha: float) -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    graph_module, images = trace(vit, (32, 32)).requires_grad_(False), torch.randn(6, 3, 32, 32)
    before = outputs(graph_module, images)
    centre = channel_means(graph_module, images)
    counts = MPTQViT(alpha=alpha).prepare_(graph_module, images, Context())
    assert counts == {"reparameterized": 6, "layer_norms": 6}
    after = outputs(graph_module, images)
    assert float((after - before).norm() / before.norm()) < 1e-4
    assert float(centre.abs().max()) > 0.2
    assert float(channel_means(graph_module, images).abs().max()) < 1e-4


def outputs(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return module(images)[0]


def channel_means(graph_module, images: Tensor) -> Tensor:
    """Of the first LayerNorm's output."""
    norm = next(n for n in graph_module.graph.nodes if n.target is torch.ops.aten.layer_norm.default)
    kept = []

    class Walk(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n is norm:
                kept.append(value.flatten(0, -2).mean(0))
            return value

    with torch.no_grad():
        Walk(graph_module).run(images)
    return kept[0]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_impossible_alphas_are_refused(alpha: float) -> None:
    with pytest.raises(RecipeError, match=r"mptq_vit: alpha is .*; it can be 0 to 1"):
        MPTQViT(alpha=alpha)
