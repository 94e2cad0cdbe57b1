"""First steps of tuning by updates of low rank, which find out what of a model and of the updates a task needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from martlet.training.low_rank import LowRank
from martlet.training.objective import RATE, Batch
from martlet.vit.view import view

HEAD_RATE, UNIT_RATE = 100.0, 50.0
"""Learning rates of masks of heads and of hidden units, over that of updates."""
ADAPTER = "default"
"""What peft calls the updates."""


class _Site(NamedTuple):
    """What a block's masks stand before: the Linear behind its heads, and the one behind its hidden units."""

    proj: str
    fc2: str
    num_heads: int


class Early(LowRank):
    """Learns a mask for each head and hidden unit along, and keeps how much each update and each of its ranks tells.

    sparsity: how much the sum of all masks weighs in the loss. module_ratio, rank_ratio: of updates, and of ranks in
    those that are left, that are dropped at the end. kept: by name, ranks of each update that is left, from then on.
    """

    updates: Tensor
    ranks: Tensor

    def __init__(
        self,
        smoothing: float,
        heads: Iterable[str],
        config: Any,
        sparsity: float,
        module_ratio: float,
        rank_ratio: float,
    ) -> None:
        super().__init__(smoothing, heads, config)
        self.sparsity, self.module_ratio, self.rank_ratio = sparsity, module_ratio, rank_ratio
        self.kept: dict[str, int] = {}
        self._late = False
        self._telling: dict[int, Tensor] = {}
        self._remove: list[Callable[[], None]] = []

    def prepare_(self, student: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        blocks = view(student).blocks
        self.sites = [_Site(b.attention.proj.name, b.mlp.fc2.name, b.attention.num_heads) for b in blocks]
        self.head_masks = nn.ParameterList(torch.ones(site.num_heads) for site in self.sites)
        self.unit_masks = nn.ParameterList(torch.ones(b.mlp.fc2.weight.shape[1]) for b in blocks)
        super().prepare_(student)
        for site, heads, units in zip(self.sites, self.head_masks, self.unit_masks, strict=True):
            for name, mask in ((site.proj, heads), (site.fc2, units)):
                hook = partial(_masked, mask=mask)
                self._remove.append(student.get_submodule(name).register_forward_pre_hook(hook).remove)
        self._layers: dict[str, Any] = {n: m for n, m in student.named_modules() if isinstance(m, LoraLayer)}
        for i, layer in enumerate(self._layers.values()):
            hook = partial(self._note, i, layer)
            self._remove.append(layer.lora_B[ADAPTER].register_forward_hook(hook).remove)
            self._remove.append(layer.get_base_layer().register_forward_hook(partial(self._note_base, i)).remove)
        self.register_buffer("updates", torch.zeros(len(self._layers)))
        self.register_buffer("ranks", torch.zeros(len(self._layers), self.config.r))

    def groups(self, student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        return [
            *super().groups(student, weight_decay),
            {"params": [*self.head_masks], "weight_decay": 0.0, RATE: HEAD_RATE},
            {"params": [*self.unit_masks], "weight_decay": 0.0, RATE: UNIT_RATE},
        ]

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        self._late = 2 * batch.step >= batch.steps
        masks = torch.cat([*self.head_masks, *self.unit_masks])
        return super().loss(student, batch) + self.sparsity * masks.abs().sum()

    @torch.no_grad()
    def climb_(self, learned: list[Tensor]) -> bool:
        """Takes no other gradient; adds up what this one says, in the later half of the steps."""
        if self._late:
            for i, layer in enumerate(self._layers.values()):
                down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # (r, I), (O, r)
                self.ranks[i] += (down * down.grad).mean(1).abs() + (up * up.grad).mean(0).abs()
                self.updates[i] += self._telling[i]
        return False

    @torch.no_grad()
    def finish_(self, student: nn.Module) -> None:
        for remove in self._remove:
            remove()
        left = best(self.updates, self.module_ratio)
        chosen = torch.zeros_like(self.ranks, dtype=torch.bool)
        numbers = best(self.ranks[left].flatten(), self.rank_ratio)
        chosen[left[numbers // self.config.r], numbers % self.config.r] = True
        for keep, (name, layer) in zip(chosen, self._layers.items(), strict=True):
            layer.lora_B[ADAPTER].weight[:, ~keep] = 0
            if keep.any():
                self.kept[name] = int(keep.sum())
        super().finish_(student)
        for site, heads, units in zip(self.sites, self.head_masks, self.unit_masks, strict=True):
            for name, mask in ((site.proj, heads), (site.fc2, units)):
                weight = student.get_submodule(name).weight
                weight.mul_(_wide(mask, weight.shape[1]))  # type: ignore[operator, arg-type, union-attr, index]

    def _note_base(self, i: int, module: nn.Module, inputs: object, out: Tensor) -> None:
        self._telling[i] = out.detach().norm(dim=-1)

    def _note(self, i: int, layer: Any, module: nn.Module, inputs: object, out: Tensor) -> None:
        update = layer.scaling[ADAPTER] * out.detach().norm(dim=-1)
        self._telling[i] = (update / self._telling[i]).mean()


def best(scores: Tensor, ratio: float) -> Tensor:
    """The numbers, ascending, of the greatest scores (N,), of which a share goes, but not all."""
    gone = min(int(ratio * len(scores) + 0.5), len(scores) - 1)
    return scores.topk(len(scores) - gone).indices.sort().values


def _masked(module: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, ...]:
    return (inputs[0] * _wide(mask, inputs[0].shape[-1]), *inputs[1:])


def _wide(mask: Tensor, width: int) -> Tensor:
    """One number for each feature of each head, or for each unit, (width,)."""
    return mask.repeat_interleave(width // len(mask))
