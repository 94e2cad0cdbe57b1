"""What blocks cost, and which cuts are made, against counts of whole models and against all possibilities."""

import itertools
from dataclasses import replace

import pytest
import torch

from martlet.core.errors import RecipeError
from martlet.measure.macs import macs
from martlet.source import load_model
from martlet.vit import view
from martlet.vit.budget import Work, allocate, between, total_macs, works
from martlet.vit.structure import BlockShape, restore_structure_, shape_of

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 56, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2)}
SMALL = {"size": (56, 56), "resize": (56, 56)}


def vit(**kwargs: object):
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY | kwargs, num_classes=5, seed=3)


def swin():
    return load_model("timm:swin_tiny_patch4_window7_224", model_kwargs=SWIN, num_classes=5, seed=3, preprocess=SMALL)


@pytest.mark.parametrize("make", [vit, swin])
def test_what_a_cut_saves_is_what_the_whole_model_does_less(make) -> None:
    model = make()
    found, before = works(model, view(model.module)), total_macs(model)
    assert before == macs(model)
    number = 1
    shape = shape_of(view(model.module).blocks[number])
    less = BlockShape(shape.num_heads, shape.qk_dim - 1, shape.v_dim - 2, shape.hidden - 3)
    sizes = [number, less.num_heads, less.qk_dim, less.v_dim, less.hidden, True]
    restore_structure_(model.module, {"blocks": [sizes], "removed": [], "width": None})
    assert before - total_macs(model) == found[number].macs(shape) - found[number].macs(less) > 0


def test_losses_between_measured_sizes_are_on_straight_lines() -> None:
    found = between({8: 0.0, 4: 2.0, 2: 3.0}, [7, 6, 4, 3, 2, 1])
    assert found == pytest.approx({7: 0.5, 6: 1.0, 4: 2.0, 3: 2.5, 2: 3.0})


def losses(generator: torch.Generator, sizes: range) -> dict[int, float]:
    """Convex: each further cut costs more."""
    steps = torch.rand(len(sizes), generator=generator).sort().values.cumsum(0)
    return dict(zip(reversed(sizes), steps.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_loses_less_for_as_many_macs(seed: int) -> None:
    """Where losses are convex and every step saves as much, to cut the cheapest first is the best there is."""
    taken, generator = view(vit().module), torch.Generator().manual_seed(seed)
    each = [Work(rows=17, keys=17, mlp_rows=17, width=12, mlp_maps=2)] * 2
    start = shape_of(taken.blocks[0])
    by_block = {(i, "hidden"): losses(generator, range(44, 48)) for i in range(2)}
    total = sum(work.macs(start) for work in each)
    ratio = 3.5 * (each[0].macs(start) - each[0].macs(replace(start, hidden=47))) / total
    shapes = allocate("it", taken, each, by_block, ratio, total)  # type: ignore[arg-type]
    lost = sum(by_block[i, "hidden"].get(shape.hidden, 0.0) for i, shape in enumerate(shapes))
    choices = [
        sum(by_block[i, "hidden"].get(left, 0.0) for i, left in enumerate(pair))
        for pair in itertools.product(range(44, 49), repeat=2)
        if 96 - sum(pair) >= 4
    ]
    assert lost == pytest.approx(min(choices))


def test_of_the_last_cut_no_more_is_made_than_is_needed() -> None:
    taken = view(vit().module)
    each = [Work(rows=17, keys=17, mlp_rows=17, width=12, mlp_maps=2)] * 2
    total = sum(work.macs(shape_of(taken.blocks[0])) for work in each)
    jump = between({48: 0.0, 8: 1.0}, range(8, 48, 4))  # the deepest level is as cheap as any
    shapes = allocate("it", taken, each, {(0, "hidden"): jump}, 0.1, total)
    saved = total - sum(work.macs(shape) for work, shape in zip(each, shapes, strict=True))
    one = each[0].macs(shapes[0]) - each[0].macs(replace(shapes[0], hidden=shapes[0].hidden - 4))
    assert 0.1 * total <= saved < 0.1 * total + one


def test_more_than_there_is_is_refused() -> None:
    taken = view(vit().module)
    each = [Work(rows=17, keys=17, mlp_rows=17, width=12, mlp_maps=2)] * 2
    with pytest.raises(
        RecipeError, match=r"^it: prune_ratio 0\.9 would empty layers .*blocks\.0; at most \d+% .*hidden"
    ):
        allocate("it", taken, each, {(0, "hidden"): {8: 1.0}}, 0.9, 10**6)
