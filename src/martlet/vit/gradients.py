"""Weights times gradients, batch by batch, without labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.technique import Batches, Progress, silent
from martlet.functional.saliency import each, head_sums, unit_sums
from martlet.vit.budget import Kind
from martlet.vit.structure import read_attention, read_mlp
from martlet.vit.view import VitView, view


def own_classes(logits: Tensor) -> Tensor:
    """The cross entropy with the classes that the logits themselves name, (B,)."""
    return functional.cross_entropy(logits, logits.argmax(1).detach(), reduction="none")


def contributions(
    module: nn.Module, images: Batches, keys: list[tuple[int, Kind]], *, absolute: bool, progress: Progress = silent
) -> Iterator[dict[tuple[int, Kind], Tensor]]:
    """For each batch, sums over what belongs to a unit of weight times gradient of the mean loss; in the shape of
    `Scores`.

    The loss is `own_classes`: there are no labels, and a divergence from the model's own logits has no gradient there.
    absolute: of each product the absolute value.
    """
    twin = copy.deepcopy(module).eval().requires_grad_(True)
    vit: VitView = view(twin)
    for done, batch in enumerate(images, 1):
        twin.zero_grad(set_to_none=True)
        with torch.enable_grad():
            own_classes(twin(batch)).mean().backward()
        found = dict[tuple[int, Kind], Tensor]()
        for number in sorted({number for number, _ in keys}):
            block = vit.blocks[number]
            product = (lambda w, g: (w * g).abs()) if absolute else torch.mul
            heads = head_sums(each(product, read_attention(block.attention), read_attention(block.attention, True)))
            units = unit_sums(each(product, read_mlp(block.mlp), read_mlp(block.mlp, True)))
            found |= {key: units if key[1] == "hidden" else heads[key[1]] for key in keys if key[0] == number}
        progress("gradients", done * len(batch), images.num_images)
        yield found
