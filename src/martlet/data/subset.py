"""Images of which some, that are chosen anew now and then, are seen a second time, changed more strongly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from martlet.data.examples import Examples


class Subset(Examples):
    """Two rows for each of k chosen images: one changed as by `plain`, and one as the training says.

    whole: all images are seen as `plain` says, and not the chosen ones alone.
    """

    def __init__(self, examples: Examples, k: int, plain: str, whole: bool) -> None:
        super().__init__(examples.pixels, examples.labels, examples.preprocess, examples.source)
        assert examples.labels is not None
        self.all_labels: Tensor = examples.labels
        self.plain, self.whole = plain, whole
        self.choose_(torch.arange(k))

    def choose_(self, chosen: Tensor) -> None:
        """Which they are, (k,)."""
        first = torch.arange(len(self.pixels)) if self.whole else chosen
        self.num_plain, self.rows = len(first), torch.cat([first, chosen])
        self.labels = self.all_labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray, seeds: np.ndarray, augment: str = "none", erase: float = 0.0) -> Tensor:
        rows = self.rows.numpy()[indices]
        plain = indices < self.num_plain
        images = torch.empty(len(indices), *self.pixels.shape[1:])
        for those, policy, noise in ((plain, self.plain, 0.0), (~plain, augment, erase)):
            if those.any():
                found = super().batch(rows[those], seeds[those], policy, noise)
                images[torch.from_numpy(those)] = self.normalize(found)
        return images
