"""Images of which a tiny model can learn the classes in a few steps."""

import torch

from martlet.data.examples import Examples
from martlet.data.preprocess import Preprocess


def colors(preprocess: Preprocess, n: int = 48, labels: bool = True) -> Examples:
    """n images that are red, green or blue, in noise, of the size that the model takes."""
    classes, generator = torch.arange(n) % 3, torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 100, (n, 3, *preprocess.size), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(n), classes] += 100
    return Examples(pixels, classes if labels else None, preprocess, "colors")
