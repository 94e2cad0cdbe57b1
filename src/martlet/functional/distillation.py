"""How far a student's outputs are from a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(softmax(t / T) ‖ softmax(s / T)), averaged over the batch, of logits (B, K).

    T² keeps gradients as large at any temperature. Source: Hinton et al., 2015, arXiv 1503.02531, section 2.1.
    """
    wanted = functional.log_softmax(teacher.float() / temperature, 1)
    found = functional.log_softmax(student.float() / temperature, 1)
    return temperature**2 * functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's logits (B, K) with the teacher's first answers as labels.

    Source: Touvron et al., DeiT, 2021, arXiv 2012.12877, equation 3, its second term.
    """
    return functional.cross_entropy(student.float(), teacher.argmax(1))


def feature_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of features (B, N, C) over the teacher's mean square: 1 is as far as zero is."""
    student, teacher = student.float(), teacher.float()
    return functional.mse_loss(student, teacher) / teacher.square().mean()


def relation(x: Tensor, heads: int) -> Tensor:
    """Log of softmax(x xᵀ / √d) over the last axis, (B, H, N, N), of x (B, N, H d).

    Source: Wang et al., MiniLMv2, 2021, arXiv 2012.15828, equation 6: queries with queries, keys with keys, values with
    values, in as many relation heads as one likes, so that the widths of student and teacher needn't be the same.
    """
    split = x.float().unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, N, d)
    return functional.log_softmax(split @ split.mT * split.shape[-1] ** -0.5, -1)


def relation_divergence(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """KL of the student's relations from the teacher's, averaged over images, heads and tokens; of x (B, N, C) each."""
    wanted, found = relation(teacher, heads), relation(student, heads)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


def sparse_targets(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest probabilities of each row of logits (B, K), and their classes, (B, k) each, largest first.

    Source: Wu et al., TinyViT, 2022, arXiv 2207.10666, section 3.1.
    """
    found = torch.softmax(logits.float(), 1).topk(k, 1)
    return found.values, found.indices


def dense_targets(values: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Probabilities (B, K) from the k largest (B, k): what is left of 1 is spread evenly over the other classes.

    Source: Wu et al., TinyViT, 2022, arXiv 2207.10666, equation 2.
    """
    k = values.shape[1]
    rest = (1 - values.sum(1, keepdim=True)) / max(num_classes - k, 1)
    return rest.expand(-1, num_classes).scatter(1, classes, values)
