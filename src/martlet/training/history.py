"""What happened while a model trained: curves, and the best weights so far."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from martlet.core.technique import Scalars

POINTS_PER_EPOCH = 20
MOST_POINTS = 200
"""Of a curve that is kept in a record."""


class History:
    """Losses, averaged over a few steps, learning rates, and what held-back images say after each epoch.

    best: the weights with the smallest loss on these, where they are asked for.
    """

    def __init__(self, per_epoch: int) -> None:
        self.every = max(1, per_epoch // POINTS_PER_EPOCH)
        self.curve: list[list[float]] = []  # step, loss, rate
        self.judgements: list[list[float | None]] = []  # step, loss, top1_pct
        self.best: dict[str, Tensor] = {}
        self.waited = 0
        self.least = float("inf")
        self._sum, self._count = 0.0, 0

    def add(self, step: int, loss: float, rate: float, scalars: Scalars) -> None:
        """One step's loss."""
        self._sum, self._count = self._sum + loss, self._count + 1
        if step % self.every == 0:
            mean = self._sum / self._count
            self.curve.append([step, mean, rate])
            scalars("train/loss", mean, step)
            scalars("train/rate", rate, step)
            self._sum, self._count = 0.0, 0

    def judged(self, step: int, loss: float, top1_pct: float | None, scalars: Scalars) -> None:
        """What images say that weren't learned from."""
        self.judgements.append([step, loss, top1_pct])
        scalars("held_back/loss", loss, step)
        if top1_pct is not None:
            scalars("held_back/top1_pct", top1_pct, step)

    def goes_on(self, patience: int, student: nn.Module) -> bool:
        """Whether the last judgement, or one of those before it that patience waits for, was the best."""
        loss = self.judgements[-1][1]
        assert loss is not None
        if loss < self.least:
            self.least, self.waited = loss, 0
            self.best = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
        else:
            self.waited += 1
        return self.waited < patience

    def record(self) -> dict[str, Any]:
        """Of a technique: few enough points to keep."""
        thin = max(1, -(-len(self.curve) // MOST_POINTS))
        return {"curve": self.curve[::-1][::thin][::-1], "held_back": self.judgements}

    def saved(self) -> dict[str, Any]:
        """JSON, from which `load_` goes on."""
        return {
            "curve": self.curve,
            "judgements": self.judgements,
            "waited": self.waited,
            "least": self.least if self.best else None,
            "sum": self._sum,
            "count": self._count,
        }

    def load_(self, data: dict[str, Any], best: dict[str, Tensor]) -> None:
        """Goes on from what was saved."""
        self.curve, self.judgements, self.waited = data["curve"], data["judgements"], data["waited"]
        self.least = float("inf") if data["least"] is None else data["least"]
        self._sum, self._count, self.best = data["sum"], data["count"], best
