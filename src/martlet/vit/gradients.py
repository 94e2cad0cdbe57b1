"""Weights times gradients, batch by batch, without labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.technique import Batches, Progress, silent
from martlet.functional.structure.saliency import each, head_sums, unit_sums
from martlet.vit.budget import Kind
from martlet.vit.structure import read_attention, read_mlp
from martlet.vit.view import VitView, view

FLOOR = 0.3
"""How much patches count together, at least, for each part that class token and the like do."""


def own_classes(logits: Tensor) -> Tensor:
    """The cross entropy with the classes that the logits themselves name, (B,)."""
    return functional.cross_entropy(logits, logits.argmax(1).detach(), reduction="none")


def token_weights(module: nn.Module, images: Batches, num_prefix: int) -> list[Tensor | None]:
    """By block, how much an error of each token that it gives counts, (N,); None where there are no tokens (B, N, C).

    The mean over images of the squared gradient of `own_classes`, one number for all patches. Late in a model that
    reads the class token this alone counts; patches then count FLOOR times as much together, because fits from one
    token an image need something that keeps them in place.
    """
    twin = copy.deepcopy(module).eval().requires_grad_(True)
    totals: dict[int, Tensor] = {}

    def note(number: int, gradient: Tensor) -> None:
        totals[number] = totals.get(number, 0) + gradient.square().sum((0, 2)).double()

    for number, block in enumerate(view(twin).blocks):

        def hook(_module: nn.Module, _args: object, out: object, number: int = number) -> None:
            if isinstance(out, Tensor) and out.ndim == 3:
                out.register_hook(partial(note, number))

        block.module.register_forward_hook(hook)
    for batch in images:
        with torch.enable_grad():
            own_classes(twin(batch)).sum().backward()
    found = list[Tensor | None]()
    for number in range(len(view(twin).blocks)):
        total = totals.get(number)
        if total is None or not num_prefix or float(total.sum()) == 0:
            found.append(None)
            continue
        prefix, patches = total[:num_prefix], total[num_prefix:]
        each = torch.clamp(patches.mean(), min=FLOOR * prefix.sum() / len(patches))
        weights = torch.cat([prefix, each.expand(len(patches))])
        found.append((weights / weights.mean()).float())
    return found


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
