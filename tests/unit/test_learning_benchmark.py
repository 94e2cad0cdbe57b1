"""benchmarks/learning.py: classes fall off evenly, the curvature is the Hessian's, and the page counts right."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from martlet.core.errors import UsageError
from martlet.core.model import Model
from martlet.data.examples import Examples
from martlet.source import load_model

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
tasks = pytest.importorskip("setups.learning_tasks")
learning = pytest.importorskip("learning")
page = pytest.importorskip("pages.learning")


@pytest.fixture(scope="module")
def model() -> Model:
    kwargs = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2}
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=kwargs, num_classes=3, seed=0)


def start(model: Model, examples: Examples) -> Any:
    return tasks.Start(model=model, pool=None, images=examples, test=examples)


@pytest.fixture(scope="module")
def examples(model: Model) -> Examples:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    preprocess = model.preprocess.override({"size": (8, 8)})
    return Examples(pixels, torch.tensor([0, 1, 2, 0, 1, 2]), preprocess, "noise")


def test_the_curvature_is_the_largest_eigenvalue_of_the_hessian(model: Model, examples: Examples) -> None:
    module = model.copy().module.double()
    names, parameters = zip(*module.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]
    images = examples.normalize(examples.pixels).double()

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split(sizes)
        state = {n: part.view_as(p) for n, part, p in zip(names, parts, parameters, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional.cross_entropy(functional_call(module, state, images), examples.labels)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in parameters]))
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    assert tasks.eigenvalue(model, start(model, examples), rounds=60) == pytest.approx(largest, rel=1e-2)


class Saddle(nn.Module):
    """Logits whose cross-entropy with the first class bends down along one weight more than up along the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 0.2]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        up, down = self.weight
        first = 2 * down**2 - up**2
        return torch.stack([first, -first], -1).expand(len(images), 2)


def test_the_curvature_is_the_largest_where_the_most_negative_is_farther(model: Model, examples: Examples) -> None:
    saddle = replace(model, module=Saddle())
    examples = Examples(examples.pixels, torch.zeros(6, dtype=torch.int64), examples.preprocess, "noise")

    def loss(weight: torch.Tensor) -> torch.Tensor:
        logits = functional_call(saddle.module, {"weight": weight}, torch.zeros(6, 3))
        return functional.cross_entropy(logits, examples.labels)

    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, torch.tensor([0.5, 0.2])))
    assert -values[0] > values[-1] > 0  # else this tests nothing
    found = tasks.eigenvalue(saddle, start(saddle, examples), rounds=200)
    assert found == pytest.approx(float(values[-1]), rel=1e-2)


def test_classes_have_fewer_images_by_the_same_factor() -> None:
    labels = torch.arange(20_000) % 10
    rows = tasks.rare(labels, seed=0)
    counts = torch.bincount(labels[rows]).tolist()
    assert (counts[0], counts[-1]) == (1000, 10)
    assert all(a / b == pytest.approx(100 ** (1 / 9), rel=0.06) for a, b in pairwise(counts))
    assert not torch.equal(rows, tasks.rare(labels, seed=1))


def test_a_teacher_of_rare_classes_sees_all_as_often() -> None:
    labels = torch.arange(20_000) % 10
    labels = labels[tasks.rare(labels, seed=0)]
    rows = tasks.balanced(labels, 1000, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [100] * 10
    assert len(rows[labels[rows] == 0].unique()) == 100  # none again where there are enough
    assert set(rows[labels[rows] == 9].tolist()) == set((labels == 9).nonzero()[:, 0].tolist())


def test_a_head_alone_answers_where_the_other_is_silent(examples: Examples) -> None:
    kwargs = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    model = load_model("timm:deit_tiny_distilled_patch16_224", model_kwargs=kwargs, num_classes=10, seed=0)
    labels = torch.tensor([7, 8, 9, 7, 8, 0])  # the last isn't rare
    its = Examples(examples.pixels, labels, examples.preprocess, "noise")
    with torch.no_grad():
        model.module.head.bias.copy_(functional.one_hot(torch.tensor(7), 10) * 100.0)
        model.module.head_dist.bias.copy_(functional.one_hot(torch.tensor(8), 10) * 100.0)
    asked = start(model, its)
    assert tasks.tail_of_class(model, asked) == pytest.approx(40)
    assert tasks.tail_of_teacher(model, asked) == pytest.approx(40)
    assert tasks.active(model, asked) == pytest.approx(50, abs=25)


def row(way: str, seed: int, top1: float) -> dict[str, Any]:
    return {
        "comparison": "random",
        "way": way,
        "recipe": f"[{way}]",
        "seed": seed,
        "images": 8,
        "n_images": 9,
        "steps": 3,
        "cpu_seconds": 1.0,
        "macs_removed_ratio": 0.0,
        "top1_pct": top1,
        "environment": {"cpu": "a", "cores": 2, "versions": {"torch": "2"}},
    }


def test_the_page_counts_the_seeds_that_are_above() -> None:
    reached = {"finetune": (50.0, 60.0), "sam": (51.0, 58.0)}
    rows = [row(way, seed, value) for way, values in reached.items() for seed, value in enumerate(values)]
    text = page.page({"rows": rows})
    assert "| sam | `[sam]` | 54.5 (51.0 to 58.0) | -0.5 (1 of 2) |" in text
    assert "| finetune | `[finetune]` | 55.0 (50.0 to 60.0) | – |" in text


def numbered(unit: Any, _assets: Path) -> Iterator[dict[str, Any]]:
    """In place of training, in other processes."""
    name, seed, ways = unit
    for way in ways:
        if name == "wrong":
            raise UsageError("no such images")
        yield {"comparison": name, "way": way, "seed": seed}


def test_what_is_measured_already_is_not_asked_for_again() -> None:
    rows = [row(way, 0, 50.0) for way in learning.COMPARISONS["random"].recipes] + [row("sam", 1, 50.0)]
    assert learning.wanted(["random"], None, rows) == [
        ("random", 1, ["finetune", "coat", "skipvit"]),
        ("random", 2, [*learning.COMPARISONS["random"].recipes]),
    ]
    assert learning.wanted(["random"], [0], rows) == []


def test_processes_give_every_row_once_and_what_went_wrong() -> None:
    units = [("a", seed, ["one", "two"]) for seed in range(3)]
    found = [*learning.side_by_side(units, Path(), 2, numbered)]
    assert sorted((r["seed"], r["way"]) for r in found) == [(s, w) for s in range(3) for w in ("one", "two")]
    with pytest.raises(UsageError, match="no such images"):
        [*learning.side_by_side([("wrong", 0, ["one"])], Path(), 1, numbered)]


def test_every_comparison_is_told_of_on_the_page() -> None:
    assert page.ABOUT.keys() == learning.COMPARISONS.keys()
    measured = {name for comparison in learning.COMPARISONS.values() for name in comparison.measures}
    assert measured == page.MEASURES.keys()
