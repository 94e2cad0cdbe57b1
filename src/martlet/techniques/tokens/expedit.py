"""expedit: neighbouring tokens are clustered, and given back from their clusters at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.functional.clustering import Grid, cluster, reconstruct
from martlet.functional.tokens import Reduction, merge, product
from martlet.vit.tokens import (
    Decision,
    Patches,
    Reading,
    TokenRun,
    check_global,
    install_,
    patches_of,
    reading,
    run_from_parts_,
)
from martlet.vit.view import VitView, view


@dataclass(frozen=True, kw_only=True)
class Expedit(Technique):
    """Cluster neighbouring tokens after some blocks, run the others on clusters, and rebuild all tokens at the end.

    A token clustering layer turns the grid of patches into a coarser one of clusters, by a few iterations of soft
    k-means in which each token sees only the clusters around it. The blocks that follow compute clusters. A token
    reconstruction layer gives each token, in its old place, a mean of its nearest clusters as they have become,
    weighted by how near they were. Made for dense outputs at high resolution; on ViT-Ti at 384 pixels, where as many
    tokens are left, `tps` keeps the tokens that it gives back a little closer. Nothing is trained.

    Args:
        clusters: the coarser grid, down and across (`clusters: [16, 16]`); the model's own changes nothing. Without it,
            two thirds of each side, rounded up.
        alpha: how many blocks compute all tokens. Without it, five twelfths of them.
        iterations: of k-means.
        reach: how many clusters away, down and across, a token may go.
        temperature: of squared distances between tokens whose channels are normalized; small is near to a choice.
        neighbours: how many clusters a token is given back from.

    Shape: (B, N, C) to (B, prefix + clusters, C) after `alpha` blocks; back to (B, N, C) at the end, unless only the
        class token is read: then the last block computes only that.
    Needs: global attention, and a fixed image size.
    Cost: at run time, two products with all tokens in each iteration; at the end, distances of tokens to clusters, and
        a selection.
    Paper: Liang et al., Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, 2022, arXiv
        2210.01035, section 3.2.
    Differs: distances are of channels normalized to mean 0 and variance 1, divided by their number, so that a
        temperature fits every model; the paper's depends on the size of its features. Shares in the reconstruction sum
        to 1, as the paper has them; in the official code their squares do. No block runs on the rebuilt tokens.
    Raises: RecipeError for clusters that the grid can't be turned into, a block that isn't there, a setting below its
        least, or a model of any image size; SourceError for a model that isn't a plain ViT.
    """

    name: ClassVar[str] = "expedit"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "cluster neighbouring tokens, and rebuild all of them at the end"
    paper: ClassVar[str] = "Liang et al., Expediting Large-Scale Vision Transformer, 2022, arXiv 2210.01035"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS, Fact.ONE_EXIT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS})

    clusters: Any = None
    alpha: Any = None
    iterations: int = 5
    reach: int = 2
    temperature: float = 0.05
    neighbours: int = 20

    def __post_init__(self) -> None:
        if self.clusters is not None:
            sides = self.clusters if isinstance(self.clusters, list | tuple) else ()
            if len(sides) != 2 or not all(_is_count(side) and side > 0 for side in sides):
                raise RecipeError(
                    f"expedit: clusters is {self.clusters!r}; it can be a grid, down and across (clusters: [16, 16])"
                )
            object.__setattr__(self, "clusters", tuple(sides))
        if self.alpha is not None and not _is_count(self.alpha):
            raise RecipeError(f"expedit: alpha is {self.alpha!r}; it can be the number of blocks that run first")
        for name, least in (("iterations", 1), ("reach", 0), ("neighbours", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"expedit: {name} is {getattr(self, name)}; it can be {least} or more")
        if not 0 < self.temperature < float("inf"):
            raise RecipeError(f"expedit: temperature is {self.temperature}; it can be a positive number")

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        return settings | {"clusters": [*self.clusters]} if self.clusters else settings

    def check(self, model: Model) -> None:
        self._plan(model, view(model.module))

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        vit = view(model.module)
        found, after, clusters = self._plan(model, vit)
        record = {"after": after, "clusters": [*clusters], **found._asdict()}
        if clusters != vit.tokens.grid:
            run_from_parts_(model, vit, after, self.name)
            self.restore_(model, record)
        return record

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        vit, after = view(model.module), record["after"]
        down, across = record["clusters"]
        if (down, across) != vit.tokens.grid:
            patches = patches_of(vit, record["num_tokens"])
            pool = {0: lambda x, size, patches: self.decide(x, patches, (down, across))}
            install_(TokenRun(vit.blocks[after:], patches, {}, False, record["num_read"], pool=pool))

    def decide(self, x: Tensor, patches: Patches, clusters: Grid) -> Decision:
        """What becomes of the tokens (B, N, C) before the first block that computes clusters."""
        assert patches.grid is not None
        first, width = patches.first, x.shape[-1]
        features = functional.layer_norm(x[:, first:], (width,)) * width**-0.5  # (B, N - first, C)
        shares = cluster(features, patches.grid, clusters, self.iterations, self.temperature, self.reach)
        reduction = Reduction(range(x.shape[1]), _beside_prefix(shares, first))
        centroids, _ = merge(features, Reduction(range(patches.number), shares))

        def restore(y: Tensor) -> Tensor:
            nearest = reconstruct(features, centroids, self.temperature, self.neighbours)  # (B, N - first, M - first)
            return torch.cat([y[:, :first], product(nearest, y[:, first:])], 1)

        return Decision(reduction, restore=restore)

    def _plan(self, model: Model, vit: VitView) -> tuple[Reading, int, Grid]:
        """What the model reads, how many blocks compute all tokens, and the grid of clusters.

        Raises:
            SourceError: windows. RecipeError: no grid, more clusters than it has, or a block that isn't there.
        """
        check_global(vit, self.name)
        found, depth = reading(model, vit), len(vit.blocks)
        patches = patches_of(vit, found.num_tokens)
        if patches.grid is None:
            raise RecipeError(
                f"expedit clusters patches by their places, and {model.name} gets {patches.number} patches, which "
                "aren't the grid that it was made for; load it for this image size, or use tome or tps"
            )
        after = 5 * depth // 12 if self.alpha is None else self.alpha
        if after >= depth:
            raise RecipeError(f"expedit: alpha is {after}; {model.name} has {depth} blocks, of which one must be left")
        clusters = self.clusters or (-(-2 * patches.grid[0] // 3), -(-2 * patches.grid[1] // 3))
        if clusters[0] > patches.grid[0] or clusters[1] > patches.grid[1]:
            raise RecipeError(
                f"expedit: clusters is {list(clusters)} at {vit.blocks[after].name}, where the patches of {model.name} "
                f"stand {patches.grid[0]} by {patches.grid[1]}; it can be at most that"
            )
        return found, after, clusters


def _beside_prefix(shares: Tensor, first: int) -> Tensor:
    """(B, M, N) -> (B, first + M, first + N): the tokens before the patches stay themselves."""
    itself = torch.eye(first, dtype=shares.dtype, device=shares.device).expand(shares.shape[0], -1, -1)
    above = torch.cat([itself, shares.new_zeros(shares.shape[0], first, shares.shape[2])], -1)
    below = torch.cat([shares.new_zeros(shares.shape[0], shares.shape[1], first), shares], -1)
    return torch.cat([above, below], 1)


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0
