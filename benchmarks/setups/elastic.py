"""A small ViT whose sizes share their weights: what `benchmarks/supernet.py` trains and cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.data import open_images
from martlet.data.examples import Examples
from martlet.functional.distillation import divergence
from martlet.functional.structure.saliency import each, head_sums, unit_sums
from martlet.training.objective import Batch, CrossEntropy, Objective
from martlet.training.technique import Training
from martlet.vit.structure import put_attention_, read_attention, read_mlp, write_mlp_
from martlet.vit.view import view
from setups.cifar import CLASSES

DEPTH, HEADS, HIDDEN = (3, 4), (2, 3, 4), (64, 128, 192, 256)
BLOCKS = range(max(DEPTH))

Choice = Mapping[str, int]
"""`depth`, and `heads0`, `hidden0` … of each block; and whatever else is chosen with them."""
WHOLE: Choice = {"depth": max(DEPTH), **{f"heads{i}": max(HEADS) for i in BLOCKS}} | {
    f"hidden{i}": max(HIDDEN) for i in BLOCKS
}
SMALLEST: Choice = {"depth": min(DEPTH), **{f"heads{i}": min(HEADS) for i in BLOCKS}} | {
    f"hidden{i}": min(HIDDEN) for i in BLOCKS
}


class Sandwich(CrossEntropy):
    """The labels by the whole network, and its answers by the smallest one and by one drawn anew in each step.

    Paper: Yu et al., Universally Slimmable Networks, 2019, arXiv 1903.05134, sections 3.2 and 3.3.
    """

    def prepare_(self, student: nn.Module) -> None:
        self.now: Choice = WHOLE
        self.handles = list(_masked(student, lambda: self.now))

    def finish_(self, student: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        self.now = WHOLE
        logits = student(batch.images)
        total = self.error(logits, batch)
        for self.now in (SMALLEST, drawn_sizes(np.random.default_rng(batch.step))):
            total = total + divergence(student(batch.images), logits.detach())
        self.now = WHOLE
        return total / 3


@dataclass(frozen=True, kw_only=True)
class Elastic(Training):
    """All weights, so that every size of the network works."""

    name: ClassVar[str] = "elastic"
    summary: ClassVar[str] = "train every size in shared weights"
    needs_labels: ClassVar[bool] = True

    def objective(self, model: Model, context: Context) -> Objective:
        return Sandwich(self.smoothing)


def _masked(module: nn.Module, now: Callable[[], Choice]) -> Iterator[Any]:
    """Hooks by which a timm ViT computes what it would without the heads, units and blocks that a choice leaves out."""
    for i, block in enumerate(module.blocks):  # type: ignore[arg-type]

        def fewer(
            name: str, groups: int, _module: nn.Module, inputs: tuple[Tensor, ...], i: int = i
        ) -> tuple[Tensor, ...]:
            (x,) = inputs
            kept = (torch.arange(groups) < now()[f"{name}{i}"]).repeat_interleave(x.shape[-1] // groups)
            return (x * kept,)

        yield block.attn.proj.register_forward_pre_hook(partial(fewer, "heads", max(HEADS)))
        yield block.mlp.fc2.register_forward_pre_hook(partial(fewer, "hidden", max(HIDDEN)))
        yield block.register_forward_hook(lambda _m, inputs, out, i=i: out if i < now()["depth"] else inputs[0])


def drawn_sizes(rng: np.random.Generator) -> Choice:
    return {
        "depth": int(rng.choice(DEPTH)),
        **{f"heads{i}": int(rng.choice(HEADS)) for i in BLOCKS},
        **{f"hidden{i}": int(rng.choice(HIDDEN)) for i in BLOCKS},
    }


def ordered_(model: Model) -> Model:
    """The model with heads and hidden units put in the order of the squares of their weights, the largest first."""
    vit = view(model.module)
    for block in vit.blocks:
        attention, mlp = read_attention(block.attention), read_mlp(block.mlp)
        heads = head_sums(each(torch.square, attention))["heads"].argsort(descending=True)
        units = unit_sums(each(torch.square, mlp)).argsort(descending=True)
        put_attention_(vit, block, attention.heads(heads))
        write_mlp_(block.mlp, mlp.units(units))
    return model


def examples(assets: Path, model: Model, part: str, n: int, skipped: int = 0) -> Examples:
    """n images of a part of CIFAR-10, after those skipped, in a drawn order."""
    pool = open_images(assets / "data" / "cifar10" / f"{part}.parquet", limit=n + skipped, seed=1)
    whole = Examples.read(pool, model.preprocess, CLASSES)
    assert whole.labels is not None
    return Examples(whole.pixels[skipped:], whole.labels[skipped:], whole.preprocess, whole.source)


def subnet(supernet: Model, choice: Choice) -> Model:
    """The network of these sizes, on its own."""
    found = supernet.copy()
    vit = view(found.module)
    for i, block in enumerate(vit.blocks):
        put_attention_(vit, block, read_attention(block.attention).heads(torch.arange(choice[f"heads{i}"])))
        write_mlp_(block.mlp, read_mlp(block.mlp).units(torch.arange(choice[f"hidden{i}"])))
    found.module.blocks = found.module.blocks[: choice["depth"]]  # type: ignore[index]
    return found
