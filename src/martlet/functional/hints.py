"""Hints: the patch of an image that a tuned model over-fits to, and what it puts there of classes that it confuses.

Source: Yu et al., Hint-Aug, 2023, arXiv 2304.12520, sections 3.3 and 3.4.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


def attention_scores(
    query: Float[Tensor, "b h d"], keys: Float[Tensor, "b h n d"], scale: float
) -> Float[Tensor, "b n"]:
    """s_j = Σ_h a_j: how much one token attends to each of n, over all heads."""
    scores = (query[:, :, None].float() * keys.float()).sum(-1)  # (b, h, n)
    return (scale * scores).softmax(-1).sum(1)


def over_fitted_patches(
    pretrained: Float[Tensor, "b n"], tuned: Float[Tensor, "b n"], sensitivity: float, k: int
) -> Int[Tensor, "b k"]:
    """The k patches whose scores tuning has changed most, where it changed an image's enough; else the most attended.

    Enough is Σ |s_P - s_T| ≥ λ Σ |s_P|, λ being the sensitivity: the larger, the fewer images are found over-fitted.
    """
    moved = (pretrained - tuned).abs()
    over_fitted = moved.sum(1) >= sensitivity * pretrained.abs().sum(1)
    return torch.where(over_fitted[:, None], moved, tuned).topk(k, 1).indices


def confusion(logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"]) -> Float[Tensor, "k k"]:
    """C_ij = Σ f_i - min f, over the images of label j: how near the model is to class i when it sees class j.

    Logits say it, and not probabilities, which for a model that is sure are 0 for all wrong classes alike.
    """
    above = logits.float() - logits.float().amin(1, keepdim=True)
    return above.new_zeros(logits.shape[1], logits.shape[1]).index_add(1, labels, above.T)


def attack_labels(confusion: Float[Tensor, "k k"], labels: Int[Tensor, " b"]) -> Float[Tensor, "b k"]:
    """C_iy / Σ_{j≠y} C_jy for i ≠ y, and 0 for the label y itself. All other classes alike while nothing is known."""
    own = functional.one_hot(labels, len(confusion)).bool()
    others = confusion.T[labels].masked_fill(own, 0)  # (b, k)
    known = others.sum(1, keepdim=True) > 0
    return functional.normalize(torch.where(known, others, (~own).float()), p=1.0, dim=1)


def infusion_error(logits: Float[Tensor, "b k"], attack: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """CrossEntropy(softmax(f), softmax(f̃)), summed over images, so that none's gradient depends on the others."""
    return functional.cross_entropy(logits.float(), attack.softmax(1), reduction="sum")


def patch_mask(patches: Int[Tensor, "b k"], grid: tuple[int, int], size: tuple[int, int]) -> Bool[Tensor, "b 1 h w"]:
    """True for the pixels of some patches, numbered in row order, of images of a size that the grid divides."""
    mask = patches.new_zeros(len(patches), grid[0] * grid[1], dtype=torch.bool).scatter(1, patches, True)
    mask = mask.unflatten(1, (1, *grid))  # (b, 1, gh, gw)
    return mask.repeat_interleave(size[0] // grid[0], 2).repeat_interleave(size[1] // grid[1], 3)


def infused(
    images: Float[Tensor, "b 3 h w"],
    step: Float[Tensor, "b 3 h w"],
    mask: Bool[Tensor, "b 1 h w"],
    low: Float[Tensor, "3 1 1"],
    high: Float[Tensor, "3 1 1"],
) -> Float[Tensor, "b 3 h w"]:
    """Images with a step added inside of the mask, and kept to what pixels can be."""
    return torch.where(mask, (images + step).clamp(low, high), images)
