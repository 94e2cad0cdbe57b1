"""sparsegpt: weights become zero, and those to the right of them make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from martlet.functional.structure.sparsity import sparsegpt
from martlet.vit.sparsity import Sparsity


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Sparsity):
    """Make those weights zero that cost a Linear's output least, two of each four, and let the others make up for it.

    Tensors keep their sizes, so only engines with kernels for such zeros gain by it, such as sparse tensor cores;
    OpenVINO and ONNX Runtime have none on CPUs.

    Shape: unchanged.
    Needs: calibration images, without labels.
    Cost: at compress time, two forward passes of the images, and a factorization for each map; at run time, what it
        was, without such kernels.
    Paper: Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023, arXiv
        2301.00774, its algorithm, with groups of two in four.
    Differs: written without the paper's text at hand. Columns are not worked on in lazy batches, which changes speed
        only. q, k and v, which read the same, are three maps.
    Raises: RecipeError for Linears whose inputs groups don't fill, or attention of torchvision's Swin; SourceError for
        a model that isn't a vision transformer.
    """

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "make two of four weights zero, and let the others make up for it"
    paper: ClassVar[str] = "Frantar and Alistarh, SparseGPT, 2023, arXiv 2301.00774"

    def sparse(self, weight: Tensor, xx: Tensor) -> Tensor:
        return sparsegpt(weight, xx, self.zeros, self.of, self.run)
