"""How far a student's outputs are from a teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(softmax(t / T) ‖ softmax(s / T)), averaged over the batch, of logits (B, K).

    T² keeps gradients as large at any temperature. Source: Hinton et al., 2015, arXiv 1503.02531.
    """
    wanted = functional.log_softmax(teacher.float() / temperature, 1)
    found = functional.log_softmax(student.float() / temperature, 1)
    return temperature**2 * functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's logits (B, K) with the teacher's first answers as labels.

    Source: Touvron et al., DeiT, 2021, arXiv 2012.12877, hard distillation without the labels.
    """
    return functional.cross_entropy(student.float(), teacher.argmax(1))
