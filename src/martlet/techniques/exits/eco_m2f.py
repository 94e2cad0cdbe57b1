"""eco_m2f: a gate that looks at an image early and says at which exit it is to leave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.functional import exits as solver
from martlet.graph.stages import cumulative_macs, stages
from martlet.nn.exit_heads import DepthGate
from martlet.nn.exits import Exit
from martlet.vit.exits import Answer, Run, run_as_, run_of

LEAST = 16
"""Images for each place to leave at, to learn from."""
LIKELIEST = (-math.inf, 0.5)
"""The window by which images leave at the place that the gate thinks likeliest."""


@dataclass(frozen=True, kw_only=True)
class EcoM2F(Technique):
    """Choose each image's exit by a gate that looks at it once, early, and not by how sure each exit is.

    Comes after exits that are trained, and trains nothing but the gate, one Linear on the mean of the tokens at the
    first exit: on images for which it is known how good each exit's answer is, and so at which it would have been best
    to leave. For another balance of cost and quality, apply it again with another `beta`: exits and model stay as they
    are. Sets the thresholds itself, and `deer` may set others after it. How sure heads are of their answers tells more
    than what a gate foresees, so this is for exits that can't say it, and where one look has to decide.

    Args:
        beta: what a model's whole cost is worth, in probability of the right answer: an image leaves where that
            probability, less beta times the share of the cost so far, is highest. 0 asks for the best answer whatever
            it costs.

    Shape: none changes.
    Needs: images, 16 or more for each place to leave at, apart from those that the exits were trained on; labels, or
        what the model answers counts as right. A model with exits, not traced yet.
    Cost: an inference an image, and a second of learning; at run time, C MACs for each place to leave at.
    Paper: Yao et al., Efficient Transformer Encoders for Mask2Former-style models (ECO-M2F), 2024, arXiv 2404.15244,
        steps B and C.
    Differs: for classification, where quality is the probability of the right answer and not of panoptic quality; known
        from the paper's abstract and summaries, and the gate from the authors' code. Cost is a share of the model's
        MACs, not the number of layers. The gate stands at the first exit, where the paper's stands between a backbone
        and the layers to choose from; it is fitted to its optimum, with a decay, and not by steps of a learning rate.
        Step A, exits trained with the model, is another technique's.
    Raises: RecipeError for a model without exits, too few images, or a beta below 0.
    """

    name: ClassVar[str] = "eco_m2f"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "a gate that chooses each image's exit, trained on a model with exits"
    paper: ClassVar[str] = (
        "Yao et al., Efficient Transformer Encoders for Mask2Former-style models, 2024, arXiv 2404.15244"
    )
    needs_images: ClassVar[bool] = True

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise RecipeError(f"eco_m2f: beta is {self.beta}; it has to be a number, and at least 0")

    def check(self, model: Model) -> None:
        if run_of(model.module) is None:
            raise RecipeError(
                f"eco_m2f: {model.name} has no exits to choose among; put linear_exits, lgvit or mue before it"
            )

    @torch.no_grad()
    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        images, run = context.calibration(self), _ungated(model)
        count = len(run.exits) + 1
        if images.num_images < LEAST * count:
            raise RecipeError(
                f"eco_m2f: {images.num_images} calibration images are too few for {count} places to leave at; give "
                f"{LEAST * count} or more (--num-calib)"
            )
        labels, features, quality = getattr(images, "labels", None), [], []
        for batch in images:
            answers, last = run.answers(batch)
            logits = torch.stack([*(each.logits for each in answers), last])  # (E + 1, B, K)
            start = sum(map(len, features))
            right = last.argmax(1) if labels is None else torch.from_numpy(labels[start : start + len(batch)])
            quality.append(logits.softmax(2)[:, torch.arange(len(batch)), right].double().numpy())
            features.append(answers[0].tokens.flatten(1, -2).mean(1).double().numpy())
            context.progress("ask every exit", start + len(batch), images.num_images)
        record = {"channels": features[0].shape[1]}
        self.restore_(model, record)
        gmacs = np.array(_macs(model)) / 1e9
        best = solver.depths(np.concatenate(quality, 1), gmacs / gmacs[-1], self.beta)
        gate, seen = model.module.gate, np.concatenate(features)
        assert isinstance(gate, DepthGate)
        for parameter, value in zip((gate.fc.weight, gate.fc.bias), solver.regression(seen, best, count), strict=True):
            parameter.copy_(torch.from_numpy(value))
        for exit_ in run.exits:
            exit_.window.copy_(torch.tensor(LIKELIEST))
        chosen = gate.fc(torch.from_numpy(seen).float()).argmax(1).numpy()
        return record | {
            "images": images.num_images,
            "labels": labels is not None,
            "gmacs": gmacs.tolist(),
            "best_pct": _pct(best, count),
            "share_pct": _pct(chosen, count),
        }

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        run, module = _ungated(model), model.module
        module.gate = DepthGate(record["channels"], len(run.exits) + 1)
        run_as_(module, GatedRun(run, module.gate, run.exits))


@dataclass(frozen=True, eq=False)
class GatedRun(Run):
    """Runs as another, but how sure exits are is what the gate makes of the tokens that the first of them reads."""

    run: Run
    gate: DepthGate
    exits: Sequence[Exit]

    def answers(self, images: Tensor) -> tuple[list[Answer], Tensor]:
        found, last = self.run.answers(images)
        sure = self.gate(found[0].tokens)  # (B, E)
        return [each._replace(confidence=sure[:, k]) for k, each in enumerate(found)], last


def _ungated(model: Model) -> Run:
    run = run_of(model.module)
    assert run is not None
    return run.run if isinstance(run, GatedRun) else run


def _macs(model: Model) -> list[int]:
    graph = pipeline.traced(model).module
    assert isinstance(graph, GraphModule)
    return cumulative_macs(stages(graph), model.preprocess.size)


def _pct(places: np.ndarray, count: int) -> list[float]:
    return (100 * np.bincount(places, minlength=count) / len(places)).round(3).tolist()
