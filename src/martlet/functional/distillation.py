"""How far a student's outputs, and what leads to them, are from a teacher's."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(softmax(t / T) ‖ softmax(s / T)), averaged over the batch, of logits (B, K).

    T² keeps gradients as large at any temperature. Source: Hinton et al., 2015, arXiv 1503.02531.
    """
    wanted = functional.log_softmax(teacher.float() / temperature, 1)
    found = functional.log_softmax(student.float() / temperature, 1)
    return temperature**2 * functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def mean_divergence(students: Iterable[Tensor], teachers: Iterable[Tensor]) -> float:
    """`divergence` of the logits of several batches, (B, K) each, averaged over all images."""
    total, count = 0.0, 0
    for student, teacher in zip(students, teachers, strict=True):
        total += float(divergence(student, teacher)) * len(student)
        count += len(student)
    return total / count


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's logits (B, K) with the teacher's first answers as labels.

    Source: Touvron et al., DeiT, 2021, arXiv 2012.12877, hard distillation without the labels.
    """
    return functional.cross_entropy(student.float(), teacher.argmax(1))


def relations(a: Float[Tensor, "*b n c"], b: Float[Tensor, "*b n c"], heads: int) -> Float[Tensor, "*b h n n"]:
    """log softmax(a bᵀ / √d) in each of so many heads of d = c / heads features: how tokens see each other.

    heads needn't be those of the model, so that models of different widths can be compared.
    Source: Wang et al., MiniLMv2, 2021, arXiv 2012.15828.
    """
    a, b = (x.float().unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (a, b))  # (…, h, n, d)
    return functional.log_softmax(a @ b.transpose(-2, -1) / a.shape[-1] ** 0.5, -1)


def relation_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of `relations` (…, h, n, n), averaged over all but the last dimension."""
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖s - t‖² / ‖t‖², of features of any shape: 1 for a student that gives nothing, on whatever scale."""
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().sum() / teacher.square().sum()


def spread(values: Float[Tensor, "b k"], classes: Int[Tensor, "b k"], num_classes: int) -> Float[Tensor, "b n"]:
    """Probabilities of all classes, of which the k largest are known: what is left is shared evenly by the others.

    Source: Wu et al., TinyViT, 2022, arXiv 2207.10666, as the official code has it.
    """
    left = (1 - values.sum(1, keepdim=True)).clamp(min=0) / max(num_classes - values.shape[1], 1)
    return left.expand(-1, num_classes).scatter(1, classes, values)


def effective_weights(counts: Float[Tensor, " k"], beta: float) -> Float[Tensor, " k"]:
    """By class, (1 - β) / (1 - β^n) of its n images, scaled to a mean of 1; a class without any counts as one image.

    Source: Cui et al., Class-Balanced Loss, 2019, arXiv 1901.05555.
    """
    weights = (1 - beta) / (1 - beta ** counts.double().clamp(min=1))
    return (weights / weights.mean()).float()
