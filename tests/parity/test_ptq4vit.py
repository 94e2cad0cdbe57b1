"""PTQ4ViT (arXiv 2111.12293): section 3.3 in plain Python and float64, and the gradients that weigh its errors."""

import math
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from martlet.core.technique import silent
from martlet.functional.quantize.hessian_search import (
    FACTORS,
    covering_step,
    search_linear,
    search_product,
    search_values,
    search_weight_steps,
)
from martlet.functional.quantize.logarithmic import GELU_SHIFT
from martlet.functional.quantize.search import AffineGrid
from martlet.functional.quantize.twin import TwinGeluGrid, TwinSoftmaxGrid
from martlet.graph.observe import MICRO_BATCH
from martlet.graph.sensitivity import IMAGES, ROWS, output_gradients, sample
from martlet.graph.sites import sites
from martlet.graph.trace import trace

BITS = 3
Matrix = list[list[float]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def on_grid(x: float, step: float, bits: int = BITS) -> float:
    """Ψ_k of section 2.2: the signed integers of k bits."""
    half = 2 ** (bits - 1)
    return min(max(round(x / step), -half), half - 1) * step


def matmul(a: Matrix, b: Matrix) -> Matrix:
    return [
        [math.fsum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a
    ]


def cost(found: Matrix, exact: Matrix, gradient: Matrix) -> float:
    """Equation of section 3.3: (Ô - O)ᵀ diag(g²) (Ô - O)."""
    return math.fsum(
        (g * (f - e)) ** 2 for rows in zip(found, exact, gradient, strict=True) for f, e, g in zip(*rows, strict=True)
    )


def covering(values: list[float]) -> float:
    return max(abs(v) for v in values) / (2 ** (BITS - 1) - 0.5)


def oracle_linear(
    rows: Matrix, weight: Matrix, gradient: Matrix, candidates: list[Callable[[float], float]]
) -> tuple[int, list[float]]:
    """Weight and input in turns, three times: the index of the input's candidate, and a step for each weight row."""
    exact = matmul(rows, [list(column) for column in zip(*weight, strict=True)])
    chosen, steps = 0, [0.0] * len(weight)
    for _ in range(3):
        rounded = [[candidates[chosen](x) for x in row] for row in rows]
        for o, w in enumerate(weight):
            column = [[row[o]] for row in exact], [[row[o]] for row in gradient]
            tried = [covering(w) * factor for factor in FACTORS]
            errors = [cost(matmul(rounded, [[on_grid(v, s)] for v in w]), *column) for s in tried]
            steps[o] = tried[errors.index(min(errors))]
        columns = [
            list(c) for c in zip(*[[on_grid(v, s) for v in w] for w, s in zip(weight, steps, strict=True)], strict=True)
        ]
        errors = [cost(matmul([[c(x) for x in row] for row in rows], columns), exact, gradient) for c in candidates]
        chosen = errors.index(min(errors))
    return chosen, steps


def gelu_on_grid(exponent: int) -> Callable[[float], float]:
    half, fine = 2 ** (BITS - 1), GELU_SHIFT / 2 ** (BITS - 1)
    coarse = fine * 2.0**exponent
    return lambda x: max(round(x / fine), -half) * fine if x < 0 else min(round(x / coarse), half - 1) * coarse


def linear_case(kind: str) -> tuple[Tensor, list, list[Callable[[float], float]]]:
    rows = draw(12, 6)
    if kind == "gelu":
        rows = torch.nn.functional.gelu(rows * 2)
        exponents = range(6, -2, -1)
        return rows, [TwinGeluGrid(BITS, e) for e in exponents], [gelu_on_grid(e) for e in exponents]
    steps = [covering(rows.flatten().tolist()) * factor for factor in (1.0, *FACTORS)]
    return (
        rows,
        [AffineGrid(BITS, step, 2 ** (BITS - 1)) for step in steps],
        [lambda x, step=step: on_grid(x, step) for step in steps],
    )


def assert_linear_is_the_papers(kind: str, function) -> None:
    rows, grids, candidates = linear_case(kind)
    weight, gradient = draw(4, 6, seed=1), draw(12, 4, seed=2) ** 3  # few outputs matter
    grid, step = function(rows, weight, gradient, grids, BITS)
    chosen, steps = oracle_linear(rows.tolist(), weight.tolist(), gradient.tolist(), candidates)
    assert grid == grids[chosen]
    assert step.flatten().tolist() == pytest.approx(steps, rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "gelu"])
def test_a_linears_search_is_the_papers(kind: str) -> None:
    assert_linear_is_the_papers(kind, search_linear)


@pytest.mark.parametrize("kind", ["linear", "gelu"])
@pytest.mark.parametrize(
    "fault",
    [
        lambda x, w, g, grids, bits: search_linear(x, w, torch.ones_like(g), grids, bits),
        lambda x, w, g, grids, bits: search_linear(x, w, g.abs().sqrt(), grids, bits),
        lambda x, w, g, grids, bits: search_linear(x, w, g, grids, bits + 1),
        lambda x, w, g, grids, bits: (search_linear(x, w, g, grids, bits)[0], covering_step(w.abs().amax(1), bits)),
    ],
)
def test_a_fault_in_a_linears_search_shows(kind: str, fault) -> None:
    with pytest.raises(AssertionError):
        assert_linear_is_the_papers(kind, fault)


def test_a_weight_of_eight_bits_is_left_alone() -> None:
    rows, grids, _ = linear_case("linear")
    grid, step = search_linear(rows, draw(4, 6, seed=1), draw(12, 4, seed=2), grids, None)
    assert step is None
    assert grid in grids


def oracle_head(x: Matrix, other: Matrix, exact: Matrix, gradient: Matrix, first: bool) -> float:
    tried = [covering([v for row in x for v in row]) * factor for factor in FACTORS]

    def error(step: float) -> float:
        rounded = [[on_grid(v, step) for v in row] for row in x]
        return cost(matmul(rounded, other) if first else matmul(other, rounded), exact, gradient)

    errors = [error(step) for step in tried]
    return tried[errors.index(min(errors))]


def test_a_product_of_heads_is_searched_head_by_head() -> None:
    q, k = draw(1, 2, 5, 3) * torch.tensor([1.0, 7.0])[:, None, None], draw(1, 2, 3, 4, seed=1)
    gradient = draw(1, 2, 5, 4, seed=2)
    found = search_product(q, k, gradient, BITS)
    for head in range(2):
        a, b, g = q[0, head].tolist(), k[0, head].tolist(), gradient[0, head].tolist()
        exact = matmul(a, b)
        steps = [covering([v for row in m for v in row]) for m in (a, b)]
        for _ in range(3):
            steps[0] = oracle_head(a, [[on_grid(v, steps[1]) for v in row] for row in b], exact, g, True)
            steps[1] = oracle_head(b, [[on_grid(v, steps[0]) for v in row] for row in a], exact, g, False)
        assert [float(found[0][head]), float(found[1][head])] == pytest.approx(steps, rel=1e-6)
    assert not torch.allclose(found[0][0], found[0][1])


def test_an_attention_map_is_split_where_its_output_errs_least() -> None:
    a, v, gradient = torch.softmax(draw(1, 1, 6, 8) * 3, -1), draw(1, 1, 8, 3, seed=1), draw(1, 1, 6, 3, seed=2)
    grids = [TwinSoftmaxGrid(BITS, exponent) for exponent in range(8)]
    grid, steps = search_values(a, v, gradient, grids, BITS)
    exact, rows = matmul(a[0, 0].tolist(), v[0, 0].tolist()), a[0, 0].tolist()

    def rounded(g: TwinSoftmaxGrid) -> Matrix:
        values = g.table().tolist()
        return [[min(values, key=lambda value: abs(value - x)) for x in row] for row in rows]

    errors = [cost(matmul(rounded(g), v[0, 0].tolist()), exact, gradient[0, 0].tolist()) for g in grids]
    assert grid == grids[errors.index(min(errors))]
    expected = oracle_head(v[0, 0].tolist(), rounded(grid), exact, gradient[0, 0].tolist(), False)
    assert float(steps) == pytest.approx(expected, rel=1e-6)


def test_steps_are_no_worse_than_the_covering_one() -> None:
    weight, rows, gradient = draw(4, 6, seed=1), draw(40, 6), draw(40, 4, seed=2)
    weight[0, 0] = 30.0  # an outlier
    exact = rows @ weight.T

    def error(step: Tensor) -> Tensor:
        rounded = (weight / step).round().clamp(-4, 3) * step
        return ((rows @ rounded.T - exact) * gradient).square().sum(0)

    full = covering_step(weight.abs().amax(1, keepdim=True), BITS)
    found = search_weight_steps(weight, rows, exact, gradient, BITS)
    assert bool((error(found) <= error(full * FACTORS[42])).all())
    assert float(error(found).sum()) < 0.9 * float(error(full).sum())


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=5).eval()


def test_gradients_are_those_of_random_combinations_of_logits(model) -> None:
    """By hooks on the module, image by image, and at the rows that `sample` takes of a value."""
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    graph_module = trace(model, (32, 32)).requires_grad_(False)
    found = list(sites(graph_module))
    gradients = output_gradients(graph_module, found, images, 7, silent)
    nodes = {site.name: site.node for site in found}
    assert set(gradients) == {site.node for site in found if site.kind != "conv"}

    kept: dict[str, list[Tensor]] = {"blocks.0.mlp.fc1": [], "head": []}
    generator = torch.Generator().manual_seed(7)
    for part in images.split(MICRO_BATCH):
        outputs: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor, outputs: dict[str, Tensor] = outputs) -> None:
            output.retain_grad()
            outputs[name] = output

        handles = [
            model.get_submodule(name).register_forward_hook(lambda _, inputs, output, name=name: keep(name, output))
            for name in kept
        ]
        logits = model(part.clone().requires_grad_())
        (logits * (torch.randint(2, logits.shape, generator=generator) * 2.0 - 1)).sum().backward()
        for handle in handles:
            handle.remove()
        for name, output in outputs.items():
            assert output.grad is not None
            kept[name].append(output.grad)
    for name, parts in kept.items():
        whole = torch.cat(parts)
        expected = sample(whole, 10, False)
        assert torch.allclose(gradients[nodes[name]], expected, atol=1e-6)
        each = ROWS // 10
        tokens = whole.flatten(1, -2).shape[1] if whole.ndim > 2 else 1
        rows = [i for i in range(tokens) if i % max(1, tokens // each) == 0]
        by_hand = torch.stack([whole.reshape(10, tokens, -1)[image, row] for image in range(10) for row in rows])
        assert torch.equal(expected, by_hand)
    scores = gradients[nodes["blocks.0.attn.scores"]]
    assert scores.shape == (len(range(0, 10, 10 // IMAGES)), 2, 65, 65)
    assert bool((gradients[nodes["head"]].abs() == 1).all())


def test_attentions_keep_the_same_images_as_their_values() -> None:
    x = torch.arange(10.0)[:, None, None, None].expand(10, 2, 3, 3)
    assert sample(x, 10, True)[:, 0, 0, 0].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    windows = x.repeat_interleave(4, 0)  # four windows of each image
    assert sample(windows, 10, True)[:, 0, 0, 0].tolist() == [float(i) for i in (0, 2, 4, 6, 8) for _ in range(4)]
    assert torch.equal(sample(torch.ones(7, 3), 10, False), torch.ones(7, 3))
