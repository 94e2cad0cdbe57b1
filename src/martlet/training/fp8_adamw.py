"""AdamW whose moments are kept in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from martlet.functional.expansion import Expanded, contract, expand

GROUP = 128
"""Numbers that share a scale and a power."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Fp8AdamW(torch.optim.Optimizer):
    """Decoupled weight decay and Adam's steps; both moments in E4M3 by groups of 128, and float32 only in a step."""

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """closure: isn't taken."""
        assert closure is None
        for group in self.param_groups:
            (beta1, beta2), rate = group["betas"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad.float()
                t = state["step"] = state.get("step", torch.zeros(())) + 1
                first, second = (self._read(state, name, gradient) for name in MOMENTS)
                first.lerp_(gradient, 1 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                root = (second / (1 - beta2 ** float(t))).sqrt_().add_(group["eps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.sub_((rate / (1 - beta1 ** float(t)) * first / root).to(parameter.dtype))
                for name, moment in zip(MOMENTS, (first, second), strict=True):
                    padded = functional.pad(moment.flatten(), [0, -moment.numel() % GROUP])
                    kept = expand(padded.view(-1, GROUP))
                    state.update({f"{name}_{field.name}": getattr(kept, field.name) for field in fields(kept)})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As it was saved: the base class would make float32 of all that belongs to a float32 parameter."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, its in state_dict["state"].items():
            device = parameters[i].device
            self.state[parameters[i]] = {k: v.clone() if k == "step" else v.to(device) for k, v in its.items()}

    def _read(self, state: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        if f"{name}_codes" not in state:
            return torch.zeros_like(like)
        kept = Expanded(**{field.name: state[f"{name}_{field.name}"] for field in fields(Expanded)})
        return contract(kept).flatten()[: like.numel()].view_as(like)
