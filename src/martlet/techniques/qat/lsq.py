"""lsq: weights, steps of the grids and all that isn't rounded are trained while everything is rounded as it will be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.training.objective import Objective
from martlet.training.rounded import Rounded, check_rounded, learning, untouched
from martlet.training.technique import Training


@dataclass(frozen=True, kw_only=True)
class LSQ(Training):
    """Train a quantized model as it is rounded, to give a teacher's logits: quantization-aware training.

    Comes after what quantizes (`uniform | lsq`, `martlet | lsq`, `gptq | lsq`), and keeps its grids: weights of 2 to 7
    bits move in floating point and are rounded whenever they are used, and their steps, the scales of activations,
    biases, norms and whatever isn't rounded train along. Weights of 8 bits and zero points stay, and so do zeros that
    `sparsegpt` or `wanda` made.

    Shape: none changes.
    Needs: images; labels aren't used. A teacher of the same classes: the untouched model if none is given.
    Cost: about five inferences a step and image, in floating point; nothing at run time.
    Paper: Esser et al., Learned Step Size Quantization, 2020, arXiv 1902.08153: gradients and their scale, held against
        others' code of it.
    Differs: grids have zero points and a step for each channel or group where the quantization before has them, and
        begin as it chose them. A step is learned relative to what it was, because AdamW, unlike the paper's SGD, takes
        steps of the same length whatever the gradient's scale; that scale, which then only weighs in where gradients
        are clipped, is taken for weights alone, with q = 2^(bits - 1), one more than the paper's. The loss is the
        teacher's logits, not labels.
    Raises: RecipeError for a setting out of range, without images, where nothing is rounded, or where the teacher is
        too; UsageError for a teacher with other classes; and as the loop does.
    """

    name: ClassVar[str] = "lsq"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "train a quantized model as it is rounded: weights, steps and the rest"
    paper: ClassVar[str] = "Esser et al., Learned Step Size Quantization, 2020, arXiv 1902.08153"

    def check(self, model: Model) -> None:
        check_rounded(model, "lsq")

    def objective(self, model: Model, context: Context) -> Objective:
        teacher, graph = untouched(model, context, "lsq")
        return Rounded(teacher, learning(model, graph))
