"""afm: each Linear becomes the product of two thin ones that gives nearly the same outputs on real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Choices, Context
from martlet.functional.structure.low_rank import Factors, Moments, of_outputs
from martlet.nn.factorization import Factorization, Site, logit_errors
from martlet.nn.low_rank import thin_linear

SEEN = 2
"""Times its rank is how many outputs of a Linear tell its principal components; of fewer, too much looks constant."""


@dataclass(frozen=True, kw_only=True)
class AFM(Factorization):
    """Factorize the Linears of any model, by the outputs that images give (atomic feature mimicking).

    Features are of lower rank than weights: the outputs' r principal components and their mean are kept, in closed
    form. Each Linear is once tried alone at half of its largest useful rank; from the change of the logits follows how
    much its lost squares count when ranks are chosen. A Linear whose factors would cost more than it does stays whole,
    and so does one that gave too few outputs, as a classifier of one token does with some dozens of images; the record
    names them. Better than `svd` wherever there are images.

    Args:
        ratio: share to remove of what the model's Linears have together; 0 replaces none.
        count: of what; `macs`, or `params`.
        allocation: `milp` gives each Linear the rank that loses least for what it costs; `same`, all the same share.
        multiple: ranks are multiples of it; kernels work on so many at once.

    Shape: none changes.
    Needs: calibration images, without labels.
    Cost: one forward pass of the images, and one of 32 of them for each Linear; at run time, two products of rank r.
    Paper: Yu et al., Unified Low-rank Compression Framework for Click-through Rate Prediction, 2024, arXiv 2405.18146,
        from its official code; Yu and Wu, Compressing Transformers: Features Are Low-Rank, but Weights Are Not, 2023.
    Differs: the papers' text wasn't at hand. All Linears are factorized from one pass of the whole model; ranks come
        from integer programming over measured changes of the logits. No activation stands between the two factors, as
        the framework for click-through rates has it before training again; nothing is fine-tuned. Embedding tables,
        which no vision model here has, aren't touched.
    Raises: RecipeError for no images or too few, for a ratio that can't be reached, or a model without a Linear worth
        factorizing.
    """

    name: ClassVar[str] = "afm"
    summary: ClassVar[str] = "two thin Linears in the place of each, nearest to what it gives on images"
    paper: ClassVar[str] = (
        "Yu et al., Unified Low-rank Compression Framework for CTR Prediction, 2024, arXiv 2405.18146"
    )
    needs_images: ClassVar[bool] = True

    def space(self) -> Choices:
        return Choices(settings={"ratio": (0.05, 0.1, 0.2)})

    @torch.no_grad()
    def factors(self, model: Model, found: list[Site], context: Context) -> dict[str, Factors]:
        moments = {site.name: Moments(site.linear.weight.shape[0]) for site in found}
        handles = [site.linear.register_forward_hook(_adds(moments[site.name])) for site in found]
        images, seen = context.calibration(self), 0
        try:
            for batch in images:
                context.progress("collecting outputs", seen, images.num_images)
                model.module(batch)
                seen += len(batch)
        finally:
            for handle in handles:
                handle.remove()
        enough = [site for site in found if moments[site.name].count >= SEEN * min(site.linear.weight.shape)]
        if not enough:
            raise RecipeError(
                f"{self.name}: {seen} images are too few for the principal components of any Linear's outputs; give "
                "more with --num-calib"
            )
        return {
            site.name: of_outputs(site.linear.weight, site.linear.bias, *moments[site.name].result()) for site in enough
        }

    def loss_of(
        self, model: Model, found: list[Site], factors: Mapping[str, Factors], context: Context
    ) -> Mapping[str, float]:
        if self.allocation == "same":
            return super().loss_of(model, found, factors, context)
        ranks = {
            site.name: min(self._ranks(site), key=lambda r, s=site: abs(2 * r - self._ranks(s)[-1])) for site in found
        }
        trials: dict[str, nn.Module] = {s.name: thin_linear(s.linear, factors[s.name].at(ranks[s.name])) for s in found}
        errors = logit_errors(model.module, trials, context.calibration(self), context.progress)
        lost = {name: factors[name].lost(rank) for name, rank in ranks.items()}
        return {name: error / lost[name] if lost[name] else 0.0 for name, error in errors.items()}


def _adds(moments: Moments):
    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        moments.add_(output.flatten(0, -2))

    return hook
