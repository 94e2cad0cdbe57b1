"""Parts of `benchmarks/token_studies.py`, a file each, and what they share with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Some:
    """A few images (N, 3, H, W) as calibration batches."""

    images: np.ndarray

    @property
    def num_images(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.from_numpy(self.images)
