"""path_ensemble: the parts of blocks whose loss the logits show least aren't computed, and the others are weighed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage, Technique
from martlet.functional.distillation import mean_divergence
from martlet.functional.structure.paths import path_scale
from martlet.vit.paths import SCALE, Path, PathRun, paths_of, restart, run_as_paths_, tokens_before
from martlet.vit.reading import check_global, reading, same_logits
from martlet.vit.streams import First
from martlet.vit.view import view

IMAGES = 64
"""How many of the calibration images influence is measured on."""
RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class PathEnsemble(Technique):
    """Leave out whole attentions and MLPs, and weigh what the others add to the tokens that the classifier reads.

    A vision transformer is a sum of paths, one through each attention and each MLP, of which some do little for the
    logits. Those go whose absence changes these least, each measured after those before it went. The others keep what
    they give to later blocks; how much they weigh in the last tokens (EnsembleScale) is fitted to the last tokens of
    the whole model. An attention or MLP that isn't there is the cut that every engine gains by. A coarse one: for the
    same MACs, `ziplm` loses less. Come before quantization, and after what cuts dimensions.

    Args:
        paths: how many attentions and MLPs to leave out, of two a block; 0 leaves none out.
        scale: fit the weights, one for each path that is left; False leaves all at 1.

    Shape: none changes.
    Needs: some hundred calibration images, without labels.
    Cost: at compress time, a forward pass of 64 images for each path and each that goes, and one of all. At run time,
        parts that aren't there, and an addition for each that is.
    Paper: Chang et al., Revisiting Vision Transformer from the View of Path Ensemble, 2023, arXiv 2308.06548: parallel
        paths, path pruning and EnsembleScale; from its abstract.
    Differs: the paper's text and code weren't at hand. Influence is the divergence of the logits on images without
        labels, where the paper looks at accuracy. A path that goes is lost to later paths too, because only that saves
        anything. Weights are one number a path, by least squares towards the whole model's tokens, and not learned;
        they are parameters, which `distill` trains. The self-distillation between paths is left out.
    Raises: RecipeError for more paths than there are but one, or no images; SourceError for attention in windows, or a
        model that isn't a vision transformer.
    """

    name: ClassVar[str] = "path_ensemble"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "leave out the attentions and MLPs that matter least, and weigh the others"
    paper: ClassVar[str] = "Chang et al., ViT from the View of Path Ensemble, 2023, arXiv 2308.06548"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.ALL_TOKENS, Fact.ONE_EXIT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS})
    needs_images: ClassVar[bool] = True

    paths: int = 1
    scale: bool = True

    def __post_init__(self) -> None:
        if self.paths < 0:
            raise RecipeError(f"{self.name}: paths is how many to leave out, not {self.paths}")

    def space(self) -> Choices:
        return Choices(settings={"paths": (1, 2, 3, 4)})

    def check(self, model: Model) -> None:
        vit = view(model.module)
        check_global(vit, self.name)
        if self.paths >= 2 * len(vit.blocks):
            raise RecipeError(
                f"{self.name}: {self.paths} of {2 * len(vit.blocks)} paths can't go; at least one of "
                f"{vit.blocks[0].name} to {vit.blocks[-1].name} has to stay"
            )

    @torch.no_grad()
    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        images, found = context.calibration(self), reading(model, view(model.module))
        twin = model.copy()
        with same_logits(twin, view(twin.module).blocks[0].name, self.name):
            run = run_as_paths_(view(twin.module))
        cut = self._least(twin, run, context)
        record = {"cut": [[*path] for path in sorted(cut)], "scaled": self.scale}
        weights = fitted(twin, run, sorted(cut), images, found.num_read) if self.scale else None
        self.restore_(model, record)
        if weights is not None:
            its = model.module.get_submodule(run.blocks[0].name).get_parameter(SCALE)
            its.copy_(weights)
        return record

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        run_as_paths_(view(model.module), [Path(*path) for path in record["cut"]], record["scaled"])

    def _least(self, twin: Model, run: PathRun, context: Context) -> list[Path]:
        """The paths to leave out, the first to go first."""
        images, cut = First(context.calibration(self), IMAGES), list[Path]()
        for _ in range(self.paths):
            context.progress("measuring paths", len(cut), self.paths)
            losses = influence(twin, run, cut, images)
            cut.append(min(losses, key=losses.__getitem__))
        return cut


def influence(twin: Model, run: PathRun, cut: list[Path], images: First) -> dict[Path, float]:
    """By path that is left, the divergence of the logits without it, and without those that were cut, in nats."""
    restart(run, ())
    whole = [twin.module(batch) for batch in images]
    losses = {}
    for path in paths_of(len(run.blocks)):
        if path not in cut:
            restart(run, [*cut, path])
            losses[path] = mean_divergence((twin.module(batch) for batch in images), whole)
    restart(run, ())
    return losses


def fitted(twin: Model, run: PathRun, cut: list[Path], images: Any, num_read: int | None) -> Tensor:
    """Weights of what the first block gets and of the paths that are left, (1 + P,), by the tokens that are read."""
    left = PathRun(run.blocks, frozenset(cut))
    size = 1 + 2 * len(run.blocks) - len(cut)
    gram, missing = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for x in tokens_before(run, twin.module, iter(images)):
        wanted, (added, total) = run.outputs(x)[1], left.outputs(x)
        rows = torch.stack([y[:, :num_read].flatten() for y in (x, *added)]).double()  # (1 + P, S)
        gram += rows @ rows.mT
        missing += rows @ (wanted - total)[:, :num_read].flatten().double()
    return path_scale(gram, missing, RIDGE)
