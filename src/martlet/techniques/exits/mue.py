"""mue: exits where the tokens have stopped changing, with the model's own head. Nothing is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.nn.exits import similarity
from martlet.vit.exits import check_after, check_none, install_, places, plain, readout, shapes
from martlet.vit.view import VitView, view

ORDERS = ("norm first", "read first")
"""Whether the last norm comes before the class token is taken, or the patches are averaged, or after."""
MAX_RELATIVE_ERROR = 1e-4
"""Of the logits, in the Euclidean norm, when the head is run on the last tokens. Rounding gives under 1e-6."""


@dataclass(frozen=True, kw_only=True)
class MuE(Technique):
    """Let images leave when two blocks in a row give nearly the same tokens, through the model's own norm and head.

    Needs no training, and so has something to say about a model in a minute. But features that change little aren't
    always features that the last head can read: heads of their own (`lgvit`) are better wherever there are images to
    train them. No image takes an exit before thresholds are set (`deer`).

    Args:
        after: how many blocks run before each exit; without any, exits are at the quarters of the depth.

    Shape: none changes. The logits are those of the exit at which an image leaves.
    Needs: nothing. A vision transformer with two blocks or more, whose tokens keep their shape between the blocks
        before an exit.
    Cost: a few inferences; at run time, for each exit that an image comes to, the head, and a cosine over all tokens.
    Paper: Tang et al., You Need Multiple Exiting, 2023, arXiv 2211.11152: the rule for encoders.
    Differs: the rule is known from the authors' code (OFA, branch feature/MuE), the paper's text wasn't at hand. There
        it is asked after every layer, of image and text apart; here at the exits, of an image. The paper trains the
        model with a loss at every layer of its decoder, which a classifier doesn't have; here it stays as it is, and
        its own norm and head stand for the decoder. A cosine of the threshold itself leaves here, and stays there.
    Raises: RecipeError for blocks that aren't there, or around which tokens change their shape, a model that has exits,
        or one whose head isn't its last norm and Linear; SourceError for a model that is no vision transformer.
    """

    name: ClassVar[str] = "mue"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "exits where tokens stop changing, with the model's own head"
    paper: ClassVar[str] = "Tang et al., You Need Multiple Exiting, 2023, arXiv 2211.11152"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ONE_EXIT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.ONE_EXIT})

    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", check_after(self.name, self.after))

    def check(self, model: Model) -> None:
        check_none(model, self.name)
        vit = view(model.module)
        places(self.name, self.after, len(vit.blocks))
        if vit.norm is None or not vit.heads:
            raise RecipeError(f"mue: {model.name} has no norm and head after its blocks to use early")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        vit = view(model.module)
        after = places(self.name, self.after, len(vit.blocks))
        self._check_shapes(model, vit, after)
        record = {"after": [*after], "order": self._order(model, vit)}
        self.restore_(model, record)
        return record

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        vit = view(model.module)
        heads = [OwnHead(vit, record["order"], n) for n in record["after"]]
        install_(model.module, vit, heads, [[n - 1, n] for n in record["after"]], lambda seen, _: similarity(*seen))

    def _check_shapes(self, model: Model, vit: VitView, after: Sequence[int]) -> None:
        """Raises:
        RecipeError: tokens that change their shape before an exit, or that the model's head can't read.
        """
        found, width = shapes(model, vit, range(len(vit.blocks))), vit.heads[0].weight.shape[1]
        able = [n for n in range(1, len(found)) if found[n - 1] == found[n] and found[n][-1] == width]
        if unable := [n for n in after if n not in able]:
            raise RecipeError(
                f"{self.name}: after {unable[0]} blocks the tokens of {model.name} have another shape than before or "
                f"than its head reads; " + (f"after can be of {able}" if able else "linear_exits has heads of its own")
            )

    def _order(self, model: Model, vit: VitView) -> str:
        """In which order the model's own norm and reading of tokens come: found by comparing its logits."""
        seen: list[Tensor] = []
        handle = vit.blocks[-1].module.register_forward_hook(lambda _, __, y: seen.append(plain(y)))
        images = torch.randn(2, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                logits = model.module(images)
        finally:
            handle.remove()
        for order in ORDERS:
            try:
                with torch.no_grad():
                    found = OwnHead(vit, order, len(vit.blocks))(seen[0])
            except (IndexError, RuntimeError):  # the tokens don't have such a shape
                continue
            if found.shape == logits.shape and (found - logits).norm() <= MAX_RELATIVE_ERROR * logits.norm():
                return order
        raise RecipeError(f"mue: the head of {model.name} isn't its last norm and a Linear; linear_exits has its own")


class OwnHead(nn.Module):
    """A copy of a model's last norm and classifiers, which reads tokens after so many blocks as the model does."""

    def __init__(self, vit: VitView, order: str, after: int) -> None:
        super().__init__()
        assert vit.norm is not None
        self.readout, self.order = readout(vit, after), order
        self.norm = copy.deepcopy(vit.norm.module)
        self.fcs = nn.ModuleList(copy.deepcopy(head.module) for head in vit.heads)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "norm first":
            x = self.norm(x)
        tokens, patches = x.flatten(1, -2), self.readout.split(x)[1]
        # A distilled model has a classifier for each of its two tokens.
        read = [tokens[:, i] for i in range(len(self.fcs))] if self.readout.num_class else [patches.mean(1)]
        if self.order == "read first":
            read = [self.norm(each) for each in read]
        return torch.stack([fc(each) for fc, each in zip(self.fcs, read, strict=True)]).mean(0)
