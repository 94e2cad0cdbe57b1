"""path_ensemble adds up, leaves out and weighs the paths that loops over a ViT's own modules find."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from martlet.core import pipeline
from martlet.core.errors import RecipeError, SourceError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data import open_images
from martlet.data.calibration import Calibration
from martlet.source import load_model
from martlet.techniques.prune.path_ensemble import RIDGE, PathEnsemble, influence
from martlet.vit.paths import SCALE, Path, PathRun, paths_of, run_as_paths_
from martlet.vit.streams import First
from martlet.vit.view import view

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3, "init_values": 0.5}
MODELS = {
    "class token": TINY,
    "no class token": TINY | {"class_token": False, "global_pool": "avg"},
    "registers and qk-norm": TINY | {"reg_tokens": 2, "qk_norm": True},
}


class Noise:
    num_images = 12

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(6, 3, 16, 16, generator=generator)


def model(name: str = "class token") -> Model:
    torch.manual_seed(0)
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=MODELS[name], num_classes=5, seed=3)
    for parameter in found.module.requires_grad_(False).parameters():
        parameter.normal_(0, 0.5)
    return found


def apply(given: Model, **settings: Any) -> Model:
    return pipeline.run(given, Recipe((PathEnsemble(**settings),)), Context(images=Noise()))


def logits(given: Model) -> Tensor:
    return torch.cat([given.module(batch) for batch in Noise()])


def paths_by_hand(module: Any, x: Tensor, gone: tuple[Path, ...] = ()) -> list[Tensor]:
    """x, and what each attention and MLP adds to it, from the blocks' own parts."""
    found = [x]
    for i, block in enumerate(module.blocks):
        if Path(i, "attention") not in gone:
            found.append(block.ls1(block.attn(block.norm1(sum(found)))))
        if Path(i, "mlp") not in gone:
            found.append(block.ls2(block.mlp(block.norm2(sum(found)))))
    return found


def tokens(module: Any, images: Tensor) -> Tensor:
    return module.norm_pre(module._pos_embed(module.patch_embed(images)))


def head(module: Any, x: Tensor) -> Tensor:
    return module.forward_head(module.norm(x))


@pytest.mark.parametrize("name", MODELS)
def test_paths_in_parallel_are_the_blocks_one_after_the_other(name: str) -> None:
    given = model(name)
    exact = logits(given)
    for settings in ({}, {"scale": False}):
        torch.testing.assert_close(logits(apply(given, paths=0, **settings)), exact, rtol=1e-4, atol=1e-4)
    module: Any = given.module
    x = tokens(module, next(iter(Noise())))
    found = paths_by_hand(module, x)
    torch.testing.assert_close(head(module, sum(found)), exact[:6], rtol=1e-4, atol=1e-4)
    run = PathRun(view(run_as_paths(given)).blocks)
    for mine, by_hand in zip(run.outputs(x)[0], found[1:], strict=True):
        torch.testing.assert_close(mine, by_hand, rtol=1e-4, atol=1e-4)


def run_as_paths(given: Model) -> Any:
    twin = given.copy().module
    run_as_paths_(view(twin))
    return twin


def divergence_by_hand(module: Any, gone: tuple[Path, ...]) -> float:
    """The mean over images of sum p (log p - log q)."""
    total = 0.0
    for images in Noise():
        parts = paths_by_hand(module, tokens(module, images), gone)
        for whole, less in zip(module(images), head(module, sum(parts)), strict=True):
            p, q = ([math.exp(v) for v in row.double().tolist()] for row in (whole, less))
            total += sum(a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q))) for a, b in zip(p, q, strict=True))
    return total / Noise.num_images


def test_influence_is_the_divergence_found_by_hand_and_the_least_go() -> None:
    given = model()
    twin = given.copy()
    run = run_as_paths_(view(twin.module))
    first = [Path(1, "mlp")]
    found = influence(twin, run, first, First(Noise(), 12))
    by_hand = {p: divergence_by_hand(given.module, (p, *first)) for p in paths_of(3) if p not in first}
    assert found == pytest.approx(by_hand, rel=1e-3)
    alone = {p: divergence_by_hand(given.module, (p,)) for p in by_hand}  # as if none had gone before
    assert found != pytest.approx(alone, rel=1e-2)
    gone = list[Path]()
    for _ in range(2):
        losses = {p: divergence_by_hand(given.module, (p, *gone)) for p in paths_of(3) if p not in gone}
        gone.append(min(losses, key=losses.__getitem__))
    done = apply(given, paths=2, scale=False)
    assert done.steps[0].record["cut"] == [[*path] for path in sorted(gone)]
    x = torch.cat([tokens(given.module, batch) for batch in Noise()])
    expected = head(given.module, sum(paths_by_hand(given.module, x, tuple(gone))))
    torch.testing.assert_close(logits(done), expected, rtol=1e-4, atol=1e-4)
    left = {name for name, _ in done.module.named_parameters()}
    parts = {"attention": "attn", "mlp": "mlp"}
    assert not [n for n in left for b, part in gone if n.startswith(f"blocks.{b}.{parts[part]}")]


def test_weights_are_the_least_squares_found_by_hand() -> None:
    given = model()
    done = apply(given, paths=2)
    gone = tuple(Path(*path) for path in done.steps[0].record["cut"])
    rows, targets = [], []
    for images in Noise():
        x = tokens(given.module, images)
        rows.append(torch.stack([p[:, 0].flatten() for p in paths_by_hand(given.module, x, gone)], 1))
        targets.append(sum(paths_by_hand(given.module, x))[:, 0].flatten())
    a, b = torch.cat(rows).double().numpy(), torch.cat(targets).double().numpy()
    pull = RIDGE * (a**2).sum(0).mean()
    ridge = np.vstack([a, np.eye(a.shape[1]) * pull**0.5]), np.concatenate([b, np.full(a.shape[1], pull**0.5)])
    found = done.module.blocks[0].get_parameter(SCALE)  # type: ignore[index, union-attr]
    np.testing.assert_allclose(found.detach().numpy(), np.linalg.lstsq(*ridge, rcond=None)[0], rtol=1e-3)
    towards_zero = np.linalg.lstsq(ridge[0], np.concatenate([b, np.zeros(a.shape[1])]), rcond=None)[0]
    assert np.abs(found.detach().numpy() - towards_zero).max() > 2e-3  # so this can fail
    exact = logits(given)
    lost = [float((logits(apply(given, paths=2, scale=scale)) - exact).norm().detach()) for scale in (True, False)]
    assert lost[0] < lost[1]


def test_the_least_influential_paths_lose_less_than_others_on_digits() -> None:
    digits = load_model("martlet:digit_vit")
    images = Calibration(open_images("martlet:digits"), digits.preprocess, n=16, seed=0)
    done = pipeline.run(digits, Recipe((PathEnsemble(paths=2, scale=False),)), Context(images=images))
    batch = torch.cat([*images])
    chosen = tuple(Path(*path) for path in done.steps[0].record["cut"])
    with torch.no_grad():
        whole = digits.module(batch).argmax(1)
        kept = {}
        for pair in {chosen, *list(itertools.combinations(paths_of(4), 2))[::4]}:
            less = head(digits.module, sum(paths_by_hand(digits.module, tokens(digits.module, batch), pair)))
            kept[pair] = float((less.argmax(1) == whole).float().mean())
    assert kept[chosen] >= 0.9
    assert kept[chosen] >= sum(kept.values()) / len(kept) + 0.05


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^path_ensemble: 6 of 6 paths can't go; at least one of blocks\.0"):
        apply(model(), paths=6)
    with pytest.raises(RecipeError, match="paths is how many to leave out, not -1"):
        PathEnsemble(paths=-1)
    swin = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
    with pytest.raises(SourceError, match=r"^path_ensemble: attention at layers\.0.* is inside windows"):
        apply(load_model("timm:swin_tiny_patch4_window7_224", model_kwargs=swin, num_classes=5), paths=1)
