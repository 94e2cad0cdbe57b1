"""probe: the classifier is learned, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from martlet.training.tuning import Tuning


@dataclass(frozen=True, kw_only=True)
class Probe(Tuning):
    """Learn a task by the classifier alone, on features as they are: what every other way to tune has to beat.

    Shape: none changes.
    Needs: images with labels (`--train`).
    Cost: about an inference a step and image; nothing at run time.
    Paper: Alain and Bengio, Understanding intermediate layers using linear classifier probes, 2017, arXiv 1610.01644.
    Differs: the last layer's features alone are probed, and images are changed as in other training.
    Raises: RecipeError for a setting out of range, or images without labels; and as the loop does.
    """

    name: ClassVar[str] = "probe"
    summary: ClassVar[str] = "learn a task by the classifier alone"
    paper: ClassVar[str] = "Alain and Bengio, Linear Classifier Probes, 2017, arXiv 1610.01644"
