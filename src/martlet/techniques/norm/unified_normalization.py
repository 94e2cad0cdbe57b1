"""unified_normalization: layer norms become factors that were learned from batches, and these go into the Linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.functional.normalization import Pairs
from martlet.nn.unified_norm import UnifiedNorm
from martlet.training.objective import Objective, Taught, Teacher
from martlet.training.technique import Training
from martlet.vit.norms import NormSite, add_biases_, fold_, norm_sites, take_out_
from martlet.vit.structure import put_
from martlet.vit.view import view

IMAGES = 256
"""How many images norms begin with."""


@dataclass(frozen=True, kw_only=True)
class UnifiedNormalization(Training):
    """Train the model with norms that divide by constants, then let the Linears beside them take these over.

    A LayerNorm looks at each token; what takes its place divides each feature by the root of its mean square over many
    batches, smoothed by a geometric mean, and leaves out batches that are far off. It begins as the factor and shift
    that come nearest to the LayerNorm on images, and learns from the teacher's logits. Afterwards no normalization is
    left to compute. Without enough training the model is far worse than before: hours, not minutes, for a large one.
    Come before quantization.

    Shape: none changes.
    Needs: images; labels aren't used. A teacher of the same classes: the untouched model if none is given.
    Cost: about four inferences a step and image, in floating point; at run time, what it was without the norms.
    Paper: Yang et al., Unified Normalization for Accelerating and Stabilizing Transformers, 2022, arXiv 2208.01313,
        from its abstract and official code.
    Differs: a trained model is converted, where the paper trains from the start: norms begin as the least squares from
        input to output of each LayerNorm, with its statistics from images, so that no steps of warming up are needed.
        The loss is the teacher's logits, not labels.
    Raises: RecipeError for a norm that no Linear stands beside, such as of queries and keys or in Swin, or without
        images; SourceError for a model that isn't a vision transformer; and as the loop does.
    """

    name: ClassVar[str] = "unified_normalization"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "train norms that are constants, and let the Linears beside them take them over"
    paper: ClassVar[str] = "Yang et al., Unified Normalization, 2022, arXiv 2208.01313"
    requires: ClassVar[frozenset[Fact]] = frozenset(
        {Fact.ALL_TOKENS, Fact.WHOLE_LINEARS, Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS}
    )

    def check(self, model: Model) -> None:
        norm_sites(view(model.module), self.name)

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        vit = view(model.module)
        sites = norm_sites(vit, self.name)
        add_biases_(sites)
        take_out_(vit, sites)

    def objective(self, model: Model, context: Context) -> Objective:
        assert context.teacher is not None
        examples = context.training
        images = context.calibration(self) if examples is None else examples.batches(IMAGES, context.seed)
        return UnifiedNorms(Teacher(context.teacher, model), norm_sites(view(model.module), self.name), images)


class UnifiedNorms(Taught):
    """The teacher's logits, learned by a student whose norms are constants for the time of the training."""

    def __init__(self, teacher: Teacher, sites: Sequence[NormSite], images: Iterable[Tensor]) -> None:
        super().__init__(teacher)
        self._sites, self._images = sites, images

    def prepare_(self, student: nn.Module) -> None:
        vit = view(student)
        device = next(student.parameters()).device
        images = (batch.to(device) for batch in self._images)
        for site, pairs in zip(self._sites, statistics(student, self._sites, images), strict=True):
            norm = cast(nn.LayerNorm, site.norm.module)
            layer = UnifiedNorm(norm.normalized_shape[0], norm.eps)
            layer.set_(*(value.float() for value in pairs.result()))
            put_(vit.root, site.norm.name, layer.to(device))

    def finish_(self, student: nn.Module) -> None:
        vit = view(student)
        for site in self._sites:
            layer = student.get_submodule(site.norm.name)
            assert isinstance(layer, UnifiedNorm)
            fold_(site, *layer.affine())
        take_out_(vit, self._sites)


@torch.no_grad()
def statistics(module: nn.Module, sites: Sequence[NormSite], images: Iterable[Tensor]) -> list[Pairs]:
    """What goes into each norm, and what it gives."""
    found = [Pairs(cast(nn.LayerNorm, site.norm.module).normalized_shape[0]) for site in sites]
    handles = [site.norm.module.register_forward_hook(_adds(its)) for site, its in zip(sites, found, strict=True)]
    try:
        for batch in images:
            module(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _adds(pairs: Pairs):
    def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        pairs.add_(args[0].flatten(0, -2).cpu(), out.flatten(0, -2).cpu())

    return hook
