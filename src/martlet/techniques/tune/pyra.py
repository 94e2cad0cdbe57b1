"""pyra: low-rank updates, and what merged tokens become before they are merged, are learned together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from martlet.core.errors import RecipeError
from martlet.core.model import Model, Step
from martlet.core.technique import Context
from martlet.nn.reactivation import Reactivation
from martlet.training.low_rank import LowRankTuning
from martlet.vit.tokens import Decide, Decision, TokenReduction, Tokens, install_, installed
from martlet.vit.view import view

LAYER = "reactivation"
"""What the layer is called in the block that merges."""


@dataclass(frozen=True, kw_only=True)
class Pyra(LowRankTuning):
    """Learn a task on a model that merges tokens: updates as of `lora`, and for each merge what a token becomes before.

    Comes after what merges pairs of tokens (`tome | pyra`), and keeps its schedule. What merging costs a task comes
    back in part, for some hundred numbers a block. Updates are merged into the weights, what changes tokens stays.
    Where nothing is merged (`tome: {r: 0}`), it is `lora`.

    Shape: none changes.
    Needs: images with labels (`--train`); a model whose tokens are merged by `tome`; the peft library.
    Cost: a step takes as much less than of `lora` as the merged tokens save; at run time a norm and five thin
        products in each block that merges.
    Paper: Xiong et al., PYRA, 2024, arXiv 2403.09192; held against the official code.
    Differs: all Linears but the classifier get an update, where the official code takes query, key and value. The two
        vectors of a merge aren't decayed. Sizes of tokens count in attention, as `tome` has them.
    Raises: RecipeError for a setting out of range, images without labels, or a model whose tokens nothing merges;
        UsageError without peft; and as the loop does.
    """

    name: ClassVar[str] = "pyra"
    summary: ClassVar[str] = "learn a task on merged tokens, and what they become before they are merged"
    paper: ClassVar[str] = "Xiong et al., PYRA, 2024, arXiv 2403.09192"

    def check(self, model: Model) -> None:
        super().check(model)
        if _merging(model) is None:
            raise RecipeError(
                f"pyra: nothing of {model.name} is merged yet; put what merges pairs of tokens before it: tome | pyra"
            )
        if any(isinstance(module, Reactivation) for module in model.module.modules()):
            raise RecipeError(f"pyra: {model.name} has such layers already; `lora` trains on")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self._put_in_(model)
        return super().apply_(model, context)

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        self._put_in_(model)

    def chosen(self, name: str, parameter: nn.Parameter) -> bool:
        return LAYER in name.split(".")

    def _put_in_(self, model: Model) -> None:
        merging, blocks = _merging(model), view(model.module).blocks
        run = installed(blocks)
        if run is None or merging is None:
            return
        first, decide = len(blocks) - len(run.blocks), dict(run.decide)
        for number, pairs in merging.record["removed"]:
            block = blocks[number]
            layer = Reactivation(block.mlp.fc2.weight.shape[0], pairs).to(block.mlp.fc2.weight)
            block.module.add_module(LAYER, layer)
            decide[number - first] = Reactivating(decide[number - first], layer)
        install_(replace(run, decide=decide))
        model.module.eval()


def _merging(model: Model) -> Step | None:
    """What said before which tokens join which."""
    found = (step for step in model.steps if isinstance(step.technique, TokenReduction) and step.technique.paired)
    return next(found, None)


@dataclass(frozen=True, eq=False)
class Reactivating:
    """Decides as another, and changes what is merged by a layer."""

    decide: Decide
    layer: Reactivation

    def __call__(self, tokens: Tokens) -> Decision:
        decision = self.decide(tokens)
        assert decision.pairs is not None
        return decision._replace(change=partial(self.layer, pairs=decision.pairs()))
