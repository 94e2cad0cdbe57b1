"""wanda: weights become zero that are small for what goes through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from martlet.functional.structure.sparsity import wanda
from martlet.vit.sparsity import Sparsity


@dataclass(frozen=True, kw_only=True)
class Wanda(Sparsity):
    """Make those weights zero whose size times the norm of their input is smallest, two of each four.

    Nothing else changes. Tensors keep their sizes, so only engines with kernels for such zeros gain by it, such as
    sparse tensor cores; OpenVINO and ONNX Runtime have none on CPUs. `sparsegpt` loses less, for more computing.

    Shape: unchanged.
    Needs: calibration images, without labels.
    Cost: at compress time, two forward passes of the images; at run time, what it was, without such kernels.
    Paper: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023, arXiv 2306.11695:
        zeros are compared in a row, as there.
    Differs: written without the paper's text at hand; a vision transformer in the place of a language model.
    Raises: RecipeError for Linears whose inputs groups don't fill, or attention of torchvision's Swin; SourceError for
        a model that isn't a vision transformer.
    """

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "make two of four weights zero, by their size and that of their inputs"
    paper: ClassVar[str] = "Sun et al., A Simple and Effective Pruning Approach (Wanda), 2023, arXiv 2306.11695"

    def sparse(self, weight: Tensor, xx: Tensor) -> Tensor:
        return wanda(weight, xx, self.zeros, self.of, self.run)
