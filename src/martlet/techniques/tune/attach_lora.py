"""attach_lora: a LoRA that was learned on the whole model joins the branches beside its rounded weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule

from martlet.core.errors import RecipeError, SourceError
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.graph.rewrite.low_rank import PREFIX, branches, widen_branches_
from martlet.source.checkpoint import read

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Of a folder that peft writes."""
KEY = re.compile(r"base_model\.model\.(?P<linear>.+)\.lora_(?P<part>[AB])\.weight")
UNKNOWN = ("use_dora", "alpha_pattern", "fan_in_fan_out", "modules_to_save", "lora_bias")
"""Settings of peft's that change what an update is; with one of them set, there is more to it than two factors."""


@dataclass(frozen=True, kw_only=True)
class AttachLora(Technique):
    """Add a LoRA to a model that `svdquant` quantized, whose rounded weights stay as they are.

    A LoRA is what the branch beside each weight is: two narrow Linears. It is appended to that, so one quantized model
    serves tasks that were learned on the whole one, and nothing is rounded anew.

    Args:
        adapter: a folder that peft's `save_pretrained` wrote, of a LoRA for the model as it was before any pass.

    Shape: none changes.
    Needs: no images.
    Cost: none to speak of; at run time r (I + O) more MACs a token for a LoRA of rank r and each Linear it updates.
    Paper: Li et al., SVDQuant, 2024, arXiv 2411.05007, whose engine attaches LoRAs so.
    Differs: a LoRA of rank r makes a branch of rank n one of n + r, in floating point like it. Grids of activations
        stay those of the model without it.
    Raises: RecipeError where no weight has a branch, for Linears that the model lacks or of another shape, and for a
        LoRA that is more than two factors; SourceError for a folder without one.
    """

    name: ClassVar[str] = "attach_lora"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "add a LoRA to a model that svdquant quantized"
    paper: ClassVar[str] = "Li et al., SVDQuant, 2024, arXiv 2411.05007"

    adapter: str = ""

    def check(self, model: Model) -> None:
        assert isinstance(model.module, GraphModule)
        known = branches(model.module)
        if not known:
            raise RecipeError(
                f"attach_lora: nothing of {model.name} is split yet; put what splits weights before it: "
                "svdquant | attach_lora"
            )
        for linear, (a, b) in self._updates().items():
            if linear not in known:
                raise RecipeError(
                    f"attach_lora: {self.adapter} updates {linear}, which has no branch in {model.name}; "
                    f"there are {len(known)}, as {next(iter(known))}"
                )
            branch = model.module.get_submodule(PREFIX + known[linear])
            wanted = len(branch.up), branch.down.shape[1]  # type: ignore[arg-type, union-attr]
            if (len(b), a.shape[1]) != wanted:
                raise RecipeError(
                    f"attach_lora: {self.adapter} updates a weight of {len(b)} x {a.shape[1]} at {linear}, "
                    f"which has {wanted[0]} x {wanted[1]} in {model.name}"
                )

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        assert isinstance(model.module, GraphModule)
        known = branches(model.module)
        updates = {known[linear]: factors for linear, factors in self._updates().items()}
        found: dict[str, Any] = {node: model.module.get_submodule(PREFIX + node) for node in updates}
        ranks = {node: len(found[node].down) + len(a) for node, (a, _) in updates.items()}
        widen_branches_(model.module, ranks)
        ratios = next(step.record["ratios"] for step in reversed(model.steps) if "ratios" in step.record)
        for node, (a, b) in updates.items():
            found[node].up.data[:, -len(a) :] = b
            found[node].down.data[-len(a) :] = a * a.new_tensor(ratios.get(node, 1.0))  # inputs were divided by them
        return {"ranks": ranks}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        widen_branches_(model.module, record["ranks"])

    def _updates(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By Linear, A (r, I) and B (O, r), this scaled as the update is."""
        if not self.adapter:
            raise RecipeError(
                "attach_lora: adapter names no folder; give one that peft wrote: attach_lora: {adapter: FOLDER}"
            )
        try:
            config = json.loads((Path(self.adapter) / CONFIG).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SourceError(
                f"attach_lora: {self.adapter} has no {CONFIG}; peft's save_pretrained writes it"
            ) from None
        except (OSError, ValueError) as error:
            raise SourceError(f"attach_lora: {Path(self.adapter) / CONFIG} can't be read: {error}") from None
        if (kind := config.get("peft_type")) != "LORA":
            raise RecipeError(f"attach_lora: {self.adapter} is of the type {kind}, not LORA")
        if more := [name for name in UNKNOWN if config.get(name)]:
            raise RecipeError(f"attach_lora: {self.adapter} has {', '.join(more)}, which is more than two factors")
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in read(Path(self.adapter) / WEIGHTS).items():
            found = KEY.fullmatch(key)
            if found is None:
                raise RecipeError(f"attach_lora: {self.adapter} has {key}, which is no factor of a Linear's update")
            parts.setdefault(found["linear"], {})[found["part"]] = value.float()
        if lone := [name for name, its in parts.items() if its.keys() != {"A", "B"}]:
            raise RecipeError(f"attach_lora: {self.adapter} has one of two factors of {lone[0]}")
        updates = {}
        for name, its in parts.items():
            rank = len(its["A"])
            scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            updates[name] = its["A"], its["B"] * scaling
        return updates
