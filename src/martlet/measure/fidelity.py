"""How close the artifact's logits are to the baseline's. Needs no labels."""

from __future__ import annotations

import math

import numpy as np

from martlet.core.report import Fidelity

CEILING_DB = 200.0
"""Logits that are equal have infinite SQNR, which JSON can't say; float32 ends far below this."""


def fidelity(reference: np.ndarray, test: np.ndarray) -> Fidelity:
    """Compares logits (images, K) of the same images, in float64.

    top1_agreement_pct: images on which both have the same first choice. kl_mean: mean over images of
    KL(softmax(reference) || softmax(test)) in nats. logit_sqnr_db: 10 log10(Σ reference² / Σ (reference - test)²), at
    most CEILING_DB.

    Raises:
        ValueError: shapes differ, or there are no images.
    """
    if reference.shape != test.shape or not len(reference):
        raise ValueError(f"fidelity compares logits of the same images, not {reference.shape} and {test.shape}")
    a, b = reference.astype(np.float64), test.astype(np.float64)
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    return {
        "top1_agreement_pct": 100 * float((a.argmax(1) == b.argmax(1)).mean()),
        "kl_mean": max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())),  # rounding can reach -1e-17
        "logit_sqnr_db": _sqnr_db(float(np.square(a).sum()), float(np.square(a - b).sum())),
        "n_images": len(a),
    }


def logit_error(reference: np.ndarray, test: np.ndarray) -> float:
    """How far logits (images, K) of one model, run in two ways, are apart: for each image the largest difference, over
    the largest logit of all; the median over images, so that a tie that goes another way in a few doesn't count.
    """
    apart = np.abs(reference.astype(np.float64) - test).max(axis=1)
    return float(np.median(apart) / np.abs(reference).max())


def _sqnr_db(signal: float, noise: float) -> float:
    if noise == 0:
        return CEILING_DB
    return min(10 * math.log10(signal / noise), CEILING_DB) if signal else -CEILING_DB


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
