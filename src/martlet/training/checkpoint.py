"""All that a run goes on from, as tensors by name and JSON: nothing in it can run code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from martlet.training.history import History


@dataclass(frozen=True)
class State:
    """What changes from step to step. The schedule and chance follow from the step alone."""

    student: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None
    history: History

    def saved(self, more: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and JSON with `more` in it."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            **_prefixed("student", self.student.state_dict()),
            **_prefixed("objective", self.objective.state_dict()),
            **({} if self.ema is None else _prefixed("ema", self.ema.state_dict())),
            **{f"optimizer.{i}.{name}": tensor for i, state in moments.items() for name, tensor in state.items()},
            **_prefixed("best", self.history.best),
        }
        return tensors, {"history": self.history.saved(), **more}

    def load_(self, tensors: Mapping[str, Tensor], data: dict[str, Any]) -> dict[str, Any]:
        """Goes on from what was saved. Returns its JSON."""
        self.student.load_state_dict(_under("student", tensors))
        self.objective.load_state_dict(_under("objective", tensors))
        if self.ema is not None:
            self.ema.load_state_dict(_under("ema", tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer", tensors).items():
            i, _, moment = name.partition(".")
            moments.setdefault(int(i), {})[moment] = tensor
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for i, state in moments.items():  # each laid out in memory as its parameter is, or sums are of other roundings
            for moment, tensor in state.items():
                if tensor.shape == parameters[i].shape:
                    state[moment] = torch.empty_like(parameters[i], dtype=tensor.dtype).copy_(tensor)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.history.load_(data["history"], _under("best", tensors))
        return data


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
