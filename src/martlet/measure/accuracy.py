"""Logits of several sessions over the same images, and how often their first choices are right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from martlet.core.errors import DataError, NumericsError, UsageError
from martlet.core.technique import Progress, silent

if TYPE_CHECKING:
    from martlet.data.images import Images
    from martlet.data.preprocess import Preprocess
    from martlet.engine.base import Session


@dataclass(frozen=True)
class Logits:
    """values: float32 (images, K) of each session. labels: None where unknown. names: of the images.

    exits: of sessions that can stop early, the stage (images,) after which each image left.
    """

    values: dict[str, np.ndarray]
    labels: list[int | None]
    names: list[str]
    exits: dict[str, np.ndarray] = field(default_factory=dict)


def logits(
    sessions: Mapping[str, Session],
    images: Images,
    preprocess: Preprocess | Mapping[str, Preprocess],
    progress: Progress = silent,
) -> Logits:
    """Decodes each image once and runs it through every session. All sessions have the same batch size.

    preprocess: of all sessions, or of each; images are decoded once for each that differs.

    Raises:
        NumericsError: a session gives NaN or infinity; names it and the first such image.
        DataError: no image can be read.
        UsageError: sessions of different batch sizes.
    """
    from martlet.data.batches import batches

    sizes = {session.batch for session in sessions.values()}
    if len(sizes) != 1:
        raise UsageError(f"sessions that are compared need one batch size, not {sorted(sizes)}")
    [batch_size] = sizes
    wanted = preprocess if isinstance(preprocess, Mapping) else dict.fromkeys(sessions, preprocess)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in sessions}
    exits: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    labels: list[int | None] = []
    names: list[str] = []
    for its in dict.fromkeys(wanted[name] for name in sessions):
        labels, names = [], []
        for batch, batch_labels, batch_names in batches(images, its, batch_size):
            n = len(batch)
            if n < batch_size:  # the last: filled with copies of its first image, whose logits are dropped
                batch = np.concatenate([batch, np.repeat(batch[:1], batch_size - n, axis=0)])
            for name in (name for name in sessions if wanted[name] == its):
                values = sessions[name](batch)[:n]
                bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
                if bad.size:
                    raise NumericsError(f"{name} gives NaN or infinity, first for the image {batch_names[bad[0]]}")
                parts[name].append(values)
                if (left := sessions[name].exits) is not None:
                    exits[name].append(left[:n])
            labels += batch_labels
            names += batch_names
            progress("run images", len(names), max(len(images), len(names)))
    if not names:
        raise DataError(f"{images.source} has no image that can be read")
    values, left = ({name: np.concatenate(its) for name, its in each.items()} for each in (parts, exits))
    return Logits(values, labels, names, left)


def topk_pct(logits: np.ndarray, labels: Sequence[int | None], k: int) -> float | None:
    """Per cent of the labeled images whose label is among the k largest logits; None if no image has a label.

    logits: (images, K). A label that ties with a larger-numbered class wins, as with argmax. With fewer than k
    classes, all are among the k.
    """
    known = np.flatnonzero([label is not None for label in labels])
    if not known.size:
        return None
    order = np.argsort(-logits[known], axis=1, kind="stable")[:, :k]  # (images, k)
    wanted = np.array(labels, dtype=object)[known][:, None]
    return 100 * float((order == wanted).any(axis=1).mean())
