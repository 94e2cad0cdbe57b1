"""What a block's products with weights take for every number of tokens, on the engine itself.

That is no line: kernels cut rows into parts, and some numbers cut badly. A ViT-Ti in bfloat16 on AMX that removes 21
tokens in block 3 and so computes 176 takes 1.03 times as long as one that removes none; with 8 fewer it takes 0.96. So
a few models can't tell it, and a reduction should leave a number of tokens that the engine likes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Stage
from martlet.deployed import deploy
from martlet.measure import latency
from martlet.vit.parts import before, linear, mlp, project, residual, through
from martlet.vit.view import BlockView, view

if TYPE_CHECKING:
    from martlet.engine.base import Engine

BLOCKS = 2
"""That are timed together."""
SAMPLES = 4
"""Of noise, that techniques learn ranges from."""
TOGETHER, SECONDS = 8, 0.5
"""Numbers of tokens timed in turns, few enough that caches are filled as by a whole model; and for how long."""


class Rows(nn.Module):
    """Blocks without their attention among tokens, which is all that they do to each token by itself.

    Tokens take the place of images, so that a number of tokens is a batch: from (M, 3, 1, C), of which the first of
    three is used, to (M, C).
    """

    def __init__(self, blocks: Sequence[BlockView]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block.module for block in blocks])
        self._views = tuple(blocks)

    def forward(self, images: Tensor) -> Tensor:
        x = images[:, 0]  # (M, 1, C)
        for block in self._views:
            attention = block.attention
            projected = project(attention, before(block, x)).flat
            width = projected[2].shape[-1]  # of the values, from which alone proj takes
            y = functools.reduce(operator.add, (each for each in projected if each.shape[-1] == width))
            y = linear(attention.proj, through(attention.norm, y))
            x = mlp(block, x + residual(block, y, first=True))
        return x[:, 0]


class Noise:
    """Tokens for techniques that learn ranges."""

    def __init__(self, width: int, seed: int) -> None:
        self._tokens = torch.randn(SAMPLES, 3, 1, width, generator=torch.Generator().manual_seed(seed))
        self.num_images = SAMPLES

    def __iter__(self) -> Iterator[Tensor]:
        yield self._tokens


def times_ms(
    source: Model, recipe: Recipe, counts: Sequence[int], engine: Engine, threads: int | None, context: Context
) -> dict[int, float]:
    """Milliseconds of one block's products with weights, by how many tokens there are.

    recipe: those of its techniques are used that change how products are computed. Each count is timed in turns with
    the largest, and told by that one's median.
    """
    blocks = view(source.module).blocks[:BLOCKS]
    width = blocks[0].mlp.fc1.weight.shape[1]
    preprocess = source.preprocess.override({"size": (1, width), "resize": None})
    module = Rows(blocks).eval()
    model = Model(name=source.name, module=module, preprocess=preprocess, num_classes=width, origin={})
    passes = tuple(technique for technique in recipe.passes if technique.stage is not Stage.MODULE)
    model = pipeline.run(model, Recipe(passes), replace(context, images=Noise(width, context.seed)))
    largest, shares, reference = max(counts), dict[int, float](), list[float]()
    with deploy(model, engine.name, progress=context.progress) as deployed:
        groups = [[*counts[i : i + TOGETHER]] for i in range(0, len(counts), TOGETHER)]
        for done, group in enumerate(groups):
            context.progress("time numbers of tokens", done, len(groups))
            runs = {}
            for count in {*group, largest}:
                session = deployed.open(count, threads)
                noise = np.random.default_rng(context.seed).standard_normal((count, 3, 1, width), dtype=np.float32)
                runs[str(count)] = functools.partial(session, noise)
            found = latency.interleave(runs, seed=context.seed, min_seconds=SECONDS)
            reference.append(float(np.median(found[str(largest)])))
            shares |= {count: float(np.median(found[str(count)] / found[str(largest)])) for count in group}
    return {count: share * float(np.median(reference)) / len(blocks) for count, share in shares.items()}
