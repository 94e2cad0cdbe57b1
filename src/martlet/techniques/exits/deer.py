"""deer: sets which images leave where, so that a budget is kept; comes last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.fx import GraphModule

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage, Technique
from martlet.functional import exits as solver
from martlet.functional.exits import Budget
from martlet.graph.stages import ask, cumulative_macs, leaves, stages, window
from martlet.nn.exits import ALWAYS

LEAST = 16
"""Images that each exit needs to be solved on."""
DROPS = (0.5, 0.0, 1.0, 2.0)
"""Points of top-1 that a search draws from."""
BUDGETS = ("mean_gmacs", "mean_latency_ms", "max_gmacs", "max_latency_ms", "max_drop", "max_risk_pct")


@dataclass(frozen=True, kw_only=True)
class DeeR(Technique):
    """Solve the thresholds of a model's exits on calibration images, for a budget.

    Of all thresholds by which the images spread over the exits as a, a², a³ …, takes those that cost least and keep
    the limits on what is lost, or lose least within a mean cost. A limit on the peak closes the exits behind it: they
    aren't even lowered, so no image, however it was made, costs more. With labels, what is lost is top-1; without,
    agreement with the model's own last answer.

    Comes after whatever rounds the model, because rounding changes confidences. Give it images apart from those that
    heads were trained on, some hundreds: on images that were trained on, exits are surer than they will be.

    Args:
        max_drop: points of top-1 that may be lost to the last open exit's answer, on the calibration images. If neither
            this nor a mean nor a risk is given, 1 point.
        mean_gmacs: the mean cost of an image, at most, in 10⁹ multiply-accumulates.
        mean_latency_ms: the same in milliseconds at batch 1, by the times that the stages take on the engine.
        max_gmacs: the cost of any image, at most.
        max_latency_ms: the same in milliseconds.
        max_risk_pct: the per cent of wrong answers that other images like these exceed with a probability of `doubt`.
        doubt: see there.

    Shape: none changes.
    Needs: images, 16 or more for each exit; labels, for limits on top-1. A model with exits.
    Cost: one inference an image; with milliseconds, the stages are lowered and timed.
    Paper: Yue et al., DeeR-VLA, 2024, arXiv 2411.02359, adaptive inference (thresholds by an exponential distribution
        over the exits, for a mean, a peak and a memory budget). Angelopoulos et al., Learn then Test, 2021,
        arXiv 2110.01052 (the guarantee on risk: fixed sequence testing of binomial p-values).
    Differs: known from the authors' code; the papers' texts weren't at hand. The base a is found by trying 400; there
        it is given by the user, and the thresholds from it can be the start of a Bayesian search with the robot in the
        loop. Where images as sure as each other have left fewer than are to leave next, all of these leave; there, none
        does. Exits ask the largest probability, or what the technique that made them says, where the paper asks how far
        two exits' actions are apart. Memory isn't limited by itself: a peak budget leaves out the stages behind it.
    Raises: RecipeError for a model without exits, too few images, a budget below the first exit, risk that can't be
        promised, or a setting out of range.
    """

    name: ClassVar[str] = "deer"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "thresholds of exits, solved on calibration images for a budget"
    paper: ClassVar[str] = (
        "Yue et al., DeeR-VLA: Dynamic Inference of Multimodal Large Language Models, 2024, arXiv 2411.02359"
    )
    needs_images: ClassVar[bool] = True

    max_drop: float | None = None
    mean_gmacs: float | None = None
    mean_latency_ms: float | None = None
    max_gmacs: float | None = None
    max_latency_ms: float | None = None
    max_risk_pct: float | None = None
    doubt: float = 0.05

    def __post_init__(self) -> None:
        for name in BUDGETS:
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value < math.inf):
                raise RecipeError(f"deer: {name} is {value!r}; it has to be a number, and at least 0")
        if not 0 < self.doubt < 1:
            raise RecipeError(f"deer: doubt is {self.doubt}; it has to be more than 0 and less than 1")
        if self._in_ms() and not (self.mean_gmacs is self.max_gmacs is None):
            raise RecipeError("deer: give budgets of cost in milliseconds or in GMACs, not in both")
        mean, most = self._cost("mean"), self._cost("max")
        if mean is not None and most is not None and mean > most:
            raise RecipeError(
                f"deer: a mean of {mean:g} {self._unit} is more than the {most:g} that any image may cost"
            )

    def _in_ms(self) -> bool:
        return not (self.mean_latency_ms is self.max_latency_ms is None)

    @property
    def _unit(self) -> str:
        return "ms" if self._in_ms() else "GMACs"

    def _cost(self, which: str) -> float | None:
        return getattr(self, f"{which}_latency_ms" if self._in_ms() else f"{which}_gmacs")

    def _budget(self) -> Budget:
        mean, drop, risk = self._cost("mean"), self.max_drop, self.max_risk_pct
        if mean is drop is risk is None:
            drop = 1.0
        return Budget(mean, drop if drop is None else drop / 100, risk if risk is None else risk / 100, self.doubt)

    def check(self, model: Model) -> None:
        assert isinstance(model.module, GraphModule)
        if not leaves(model.module):
            raise RecipeError(f"deer: {model.name} has no exits; put linear_exits, lgvit, mue or cascade before it")

    def space(self) -> Choices:
        given = any(getattr(self, name) is not None for name in BUDGETS)
        return Choices(settings={} if given else {"max_drop": DROPS}, follows=Fact.ONE_EXIT)

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        images, module = context.apart or context.calibration(self), model.module
        assert isinstance(module, GraphModule)
        exits, parts = leaves(module), stages(module)
        if images.num_images < LEAST * len(parts):
            raise RecipeError(
                f"deer: {images.num_images} calibration images are too few for {len(parts)} places to leave at; give "
                f"{LEAST * len(parts)} or more (--num-calib; of a search, --num-images)"
            )
        macs = np.array(cumulative_macs(parts, model.preprocess.size))
        costs = self._stage_ms(model, context) if self._in_ms() else macs / 1e9
        count = self._open(costs)
        confidences, answers = ask(parts, images, context.progress)
        labels = getattr(images, "labels", None)
        right = answers == (answers[-1] if labels is None else labels)
        budget = self._budget()
        if budget.mean is not None and budget.mean < costs[0]:
            raise RecipeError(
                f"deer: a mean of {budget.mean:g} {self._unit} is below the first exit, which costs {costs[0]:.4g}"
            )
        given = confidences[: count - 1], right[:count], costs[:count], budget
        plan = solver.solve(*given)
        if plan is None:
            raise RecipeError(f"deer: {self._refusal(budget, right[count - 1])}")
        for k, exit_ in enumerate(exits):
            high = plan.thresholds[k] if k < count - 1 else math.inf
            bounds = ALWAYS if k >= count - 1 else (-math.inf, high)
            window(module, exit_).copy_(torch.tensor(bounds))
        unseen = solver.held_out(*given)
        return {
            "images": images.num_images,
            "labels": labels is not None,
            "thresholds": [float(t) if math.isfinite(t) else str(t) for t in plan.thresholds],
            "share_pct": _pct(plan.share),
            "gmacs": (macs[:count] / 1e9).tolist(),
            "ms": costs[:count].tolist() if self._in_ms() else None,
            "mean": plan.cost,
            "unit": self._unit,
            "right_pct": 100 * (1 - plan.wrong),
            "last_right_pct": 100 * float(right[-1].mean()),
            "unseen": unseen and {"mean": unseen.cost, "right_pct": 100 * (1 - unseen.wrong)},
            "promise": self._promise(budget, labels is not None),
        }

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        """Windows are tensors of the model, and follow from the artifact's."""

    def _stage_ms(self, model: Model, context: Context) -> np.ndarray:
        from martlet.measure.stages import stage_ms

        image = next(iter(context.apart or context.calibration(self)))[:1].numpy()
        return np.cumsum(stage_ms(model, context.engine or "openvino", image, context.seed, context.progress))

    def _open(self, costs: np.ndarray) -> int:
        """How many places to leave at stay open under the limit on any image's cost."""
        most = self._cost("max")
        if most is None:
            return len(costs)
        count = int((costs <= most * (1 + solver.EXACT)).sum())
        if not count:
            raise RecipeError(
                f"deer: the most an image may cost, {most:g} {self._unit}, is below the first exit, which costs "
                f"{costs[0]:.4g}"
            )
        return count

    def _refusal(self, budget: Budget, right: np.ndarray) -> str:
        if budget.risk is not None:
            half = len(right) - len(right) // 2
            return (
                f"{100 * budget.risk:g} % of wrong answers can't be promised from {half} images, on which the last "
                f"answer is wrong for {100 * (1 - right[-half:].mean()):.2f} %; allow more, or give more images "
                f"(--num-calib)"
            )
        return f"no thresholds keep to {self}; allow a larger mean or a larger drop"

    def _promise(self, budget: Budget, labelled: bool) -> str | None:
        if budget.risk is None:
            return None
        wrong, sure = "wrong" if labelled else "other than the last answer", 100 * (1 - self.doubt)
        return (
            f"at most {100 * budget.risk:g} % {wrong} on images like the calibration images, with {sure:g} % confidence"
        )


def _pct(share: np.ndarray) -> list[float]:
    return [round(100 * float(each), 3) for each in share]
