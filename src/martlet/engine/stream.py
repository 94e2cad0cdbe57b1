"""Two models on a stream of frames, of which one runs on each: the small one while outputs are steady."""

from __future__ import annotations

import numpy as np

from martlet.core.errors import UsageError
from martlet.engine.base import IMAGES, Session
from martlet.engine.staged import StagedSession
from martlet.functional.switching import change


class Stream:
    """Runs the big model where the outputs of the last two frames were `threshold` or more apart, and on the first two.

    Unlike a cascade it decides before anything runs, so a frame costs one model and never two, and what a model gives
    may be any numbers, such as a position. `functional.switching` finds the threshold on a stream whose answers are
    known.

    small, big: sessions of batch 1 for the same images.

    Source: Motetti et al., Adaptive Deep Learning aboard Nano-drones, 2024, arXiv 2401.15236, whose policy by temporal
    consistency is known from the paper's abstract and summaries; those by auxiliary tasks aren't here.

    Raises:
        UsageError: a session of another batch, or a threshold below 0.
    """

    def __init__(self, small: Session, big: Session, threshold: float) -> None:
        if small.batch != 1 or big.batch != 1:
            raise UsageError(
                f"a stream takes one frame at a time, not batches of {small.batch} and {big.batch}; open with batch=1"
            )
        if not threshold >= 0:
            raise UsageError(f"the threshold of a stream is {threshold}; it can't be less than 0")
        self.small, self.big, self.threshold = small, big, threshold
        self.restart()

    @classmethod
    def of(cls, cascade: Session, threshold: float) -> Stream:
        """Of an artifact that `martlet cascade --no-average` made of two models.

        Raises:
            UsageError: it is none, or its second model needs what the first gave.
        """
        if not isinstance(cascade, StagedSession) or len(cascade.steps) != 2:
            raise UsageError("a stream is of two models; make one artifact of them with: martlet cascade --no-average")
        if cascade.steps[1].inputs != (IMAGES,):
            raise UsageError(
                "the second model of this artifact needs what the first gave, so it can't run alone; make a cascade "
                "with: martlet cascade --no-average"
            )
        small, big = cascade.stages()
        return cls(small, big, threshold)

    def restart(self) -> None:
        """Begins another stream: the next frame has none before it."""
        self._outputs: list[np.ndarray] = []
        self.big_ran = True

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Runs float32 (1, 3, H, W) to float32 (1, K). `big_ran` says which model it was."""
        last = self._outputs
        self.big_ran = len(last) < 2 or change(last[1][0], last[0][0]) >= self.threshold
        model = self.big if self.big_ran else self.small
        output = np.array(model.run([frame])[0], dtype=np.float32)
        self._outputs = [*last[-1:], output]
        return output
