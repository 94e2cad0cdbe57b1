"""fp8: weights and activations as floats of 8 bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from martlet.core.errors import NumericsError, RecipeError, UsageError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.functional.quantize.formats import FLOAT8
from martlet.graph import rounding
from martlet.graph.fit import Call, Fitted, fit
from martlet.graph.low_bit import FIT_IMAGES
from martlet.graph.sites import sites
from martlet.nn.quantizers import ActivationQuantizer, WeightQuantizer

FORMATS = {name.removeprefix("fp8_"): name for name in FLOAT8}


@dataclass(frozen=True, kw_only=True)
class FP8(Technique):
    """Quantize weights and activations to 8-bit floats.

    Rounds the weight of every Linear and convolution, its input, and q, k, v and the softmax's output of every
    attention. Their steps grow with the values, so that outliers cost other values nothing, and no range has to be
    chosen with care. No engine here multiplies them on a CPU: the speed is simulated. Where integers run, `int8` is as
    small and fast.

    Args:
        weights: `e4m3`, with 3 bits of mantissa, or `e5m2`, with 2 and a wider range; a scale for each output channel.
        activations: likewise, with a scale for each tensor.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: one forward pass.
    Paper: Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv 2209.05433, section 3 and table 1.
    Differs: scales take the greatest magnitude seen to the format's greatest value, where the paper leaves the choice
        of a scale open; q, k, v and softmax are rounded too. What is beyond saturates.
    Raises: RecipeError for another format or without images; UsageError if the model multiplies nothing; NumericsError
        for an activation that is NaN.
    """

    name: ClassVar[str] = "fp8"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "8-bit floats, e4m3 or e5m2, wherever the model multiplies; simulated"
    paper: ClassVar[str] = "Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv 2209.05433"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS, Fact.UNFUSED})
    needs_images: ClassVar[bool] = True

    weights: str = "e4m3"
    activations: str = "e4m3"

    def __post_init__(self) -> None:
        for field in ("weights", "activations"):
            if getattr(self, field) not in FORMATS:
                raise RecipeError(f"fp8: {field} is {getattr(self, field)!r}; it can be {' or '.join(FORMATS)}")

    def check(self, model: Model) -> None:
        assert isinstance(model.module, GraphModule)
        if not any(True for _ in sites(model.module)):
            raise UsageError(f"fp8: {model.name} has no Linear, convolution or attention product to quantize")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        graph_module = model.module
        assert isinstance(graph_module, GraphModule)
        found, images = list(sites(graph_module)), torch.cat(list(context.calibration(self)))
        few = images[:: max(1, len(images) // FIT_IMAGES)][:FIT_IMAGES]  # of all classes, if they come in order
        fitted = fit(graph_module, found, few, self.decide, rounded=True, progress=context.progress)
        return {
            "quantized": dict(sorted(Counter(site.kind for site in found).items())),
            "rounding": rounding.insert_(graph_module, fitted.activations, fitted.weights),
        }

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        rounding.restore_(model.module, record["rounding"])

    def decide(self, call: Call) -> Fitted:
        """How one multiplication's operands are rounded."""
        dtype, operands = FLOAT8[FORMATS[self.activations]], {}
        for position, operand in call.operands.items():
            greatest = operand.value.abs().max()
            if not bool(torch.isfinite(greatest)):
                raise NumericsError(f"fp8: an input of {call.site.name} is NaN or infinite")
            scale = torch.where(greatest > 0, greatest / torch.finfo(dtype).max, 1.0)
            operands[position] = ActivationQuantizer(scale, torch.zeros((), dtype=dtype))
        if call.weight is None:
            return Fitted(operands)
        if not bool(torch.isfinite(call.weight).all()):
            raise NumericsError(f"fp8: the weight of {call.site.name} is NaN or infinite")
        weight = WeightQuantizer.fit_float8(call.weight.detach(), FORMATS[self.weights], call.site.output_axis)
        return Fitted(operands, weight)
