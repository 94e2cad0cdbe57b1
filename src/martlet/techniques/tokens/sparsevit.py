"""sparsevit: blocks of a Swin compute the windows in which most happens, and leave out the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.functional.evolution import evolve
from martlet.vit.reading import same_logits
from martlet.vit.view import BlockView, VitView, view
from martlet.vit.windows import install_windows_, num_windows

RATIOS = tuple(i / 10 for i in range(9))
"""What the search chooses from."""
DEFAULT = 0.3
ROUNDING = 1e-9
"""Of a share of windows that is a whole number but for rounding."""


@dataclass(frozen=True, kw_only=True)
class SparseViT(Technique):
    """Compute the windows of the greatest activations, and let the others pass blocks unchanged.

    Windows are ranked by the L2 norm of their tokens, once a stage, before the first of its blocks that leaves some
    out. A model that was trained with all windows loses by it, how much depends on the block: take the ratios from
    `search_ratios`, measure, and train on where you can. Worth it where windows are many, at high resolution: at 224
    pixels the last stage of a Swin has one.

    Args:
        ratio: the share of windows that is left out, of every block (`ratio: 0.3`) or of some (`ratio: {0: 0.4, 1:
            0.4}`, blocks counted from 0 through all stages), from 0 to less than 1. Windows are left out whole, and at
            least one stays. Without it, 0.3.

    Shape: unchanged between blocks; (B, K, N, C) of (B, W, N, C) inside, K = ceil((1 - ratio) W).
    Needs: attention in windows (Swin of timm, Hugging Face or torchvision), and an image size at which a block has two
        windows or more. To be as good as the paper's, training with random ratios (its sparsity-aware adaptation).
    Cost: at run time, a sum of squares and two selections a stage, a lookup and a write in each block that prunes.
    Paper: Chen et al., SparseViT: Revisiting Activation Sparsity for Efficient High-Resolution Vision Transformer,
        2023, arXiv 2303.17605, section 3.
    Differs: nothing is trained. The norm is over tokens and channels, where the official code takes that over tokens
        of the mean absolute channel. The number of windows is rounded up, there down.
    Raises: RecipeError for ratios that don't fit the model, or a model without windows; SourceError for one that isn't
        a vision transformer; NumericsError for one whose blocks compute more than their parts.
    """

    name: ClassVar[str] = "sparsevit"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "compute the windows of a Swin in which most happens"
    paper: ClassVar[str] = "Chen et al., SparseViT: Revisiting Activation Sparsity, 2023, arXiv 2303.17605"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS, Fact.ONE_EXIT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS})

    ratio: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", _ratios(self.ratio))

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        return settings | {"ratio": dict(self.ratio)} if isinstance(self.ratio, tuple) else settings

    def check(self, model: Model) -> None:
        self._kept(model, view(model.module))

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        vit = view(model.module)
        windows, kept = self._kept(model, vit)
        record = {"windows": windows, "kept": [*map(list, kept.items())]}
        if kept:
            with same_logits(model, vit.blocks[min(kept)].name, self.name):
                install_windows_(vit.blocks, {block: windows[block] for block in kept})
            self.restore_(model, record)
        return record

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        if record["kept"]:
            install_windows_(view(model.module).blocks, dict(record["kept"]))

    def _kept(self, model: Model, vit: VitView) -> tuple[list[int], dict[int, int]]:
        """The number of windows of each block, and how many of them are computed where it isn't all.

        Raises:
            RecipeError: no windows, or a block that isn't there.
        """
        windows = num_windows(model, vit, self.name)
        depth = len(windows)
        if isinstance(self.ratio, tuple):
            ratios = dict(self.ratio)
        else:
            ratios = dict.fromkeys(range(depth), DEFAULT if self.ratio is None else self.ratio)
        if ratios and max(ratios) >= depth:
            raise RecipeError(
                f"sparsevit: ratio names block {max(ratios)}; {model.name} has the blocks 0 to {depth - 1}"
            )
        kept = {block: _num_kept(windows[block], ratio) for block, ratio in ratios.items()}
        return windows, {block: number for block, number in kept.items() if number < windows[block]}


class Ratios(NamedTuple):
    """What `search_ratios` found. loss: the mean KL divergence from the untouched model, in nats.

    uniform_ratio, uniform_loss: the least ratio that can be afforded in all blocks, and what it loses.
    """

    ratio: dict[int, float]
    loss: float
    uniform_ratio: float
    uniform_loss: float


def search_ratios(
    model: Model,
    images: Iterable[Tensor],
    budget: float,
    cost: Callable[[Mapping[int, int]], float] | None = None,
    *,
    population: int = 100,
    parents: int = 25,
    generations: int = 10,
    seed: int = 0,
) -> Ratios:
    """The ratios that lose least on images (B, 3, H, W) at a cost of at most `budget`, by evolutionary search.

    Two blocks after each other, one with shifted windows and one without, share a ratio, as in the paper, out of 0, 0.1
    … 0.8, and in a stage ratios go up. cost: of a number of windows computed in each block; a latency table's, or,
    without one, the MACs of all blocks as a share of those with all windows. The paper's population is 100; each
    candidate costs a forward pass of all images.
    Source: Chen et al., SparseViT, 2023, arXiv 2303.17605, section 3.

    Raises:
        RecipeError: no windows to leave out, or a budget under the cost of the greatest ratios.
    """
    twin = model.copy()
    vit = view(twin.module)
    windows = num_windows(twin, vit, "sparsevit")
    if cost is None:
        cost = partial(_share_of_macs, vit.blocks, windows)
    genes, ordered = list[list[int]](), list[list[int]]()
    for stage in sorted({block.stage for block in vit.blocks}):
        blocks = [i for i, block in enumerate(vit.blocks) if block.stage == stage]
        if windows[blocks[0]] > 1:
            pairs = [blocks[i : i + 2] for i in range(0, len(blocks), 2)]
            ordered.append([*range(len(genes), len(genes) + len(pairs))])
            genes += pairs
    if not genes:
        raise RecipeError(
            f"sparsevit: at {twin.preprocess.size} {model.name} has one window in each block; none can go"
        )
    batches = [*images]
    with torch.no_grad():
        expected = [twin.module(x).log_softmax(-1) for x in batches]

    def kept(genome: tuple[int, ...]) -> dict[int, int]:
        found = dict(enumerate(windows))
        for gene, choice in zip(genes, genome, strict=True):
            found |= {block: _num_kept(windows[block], RATIOS[choice]) for block in gene}
        return found

    def loss(genome: tuple[int, ...]) -> float:
        install_windows_(vit.blocks, {b: number for b, number in kept(genome).items() if number < windows[b]})
        total = 0.0
        with torch.no_grad():
            for x, reference in zip(batches, expected, strict=True):
                found = twin.module(x).log_softmax(-1)
                total += float((reference.exp() * (reference - found)).sum())
        return total / sum(len(x) for x in batches)

    all_choices = [len(RATIOS)] * len(genes)
    uniform = [(choice,) * len(genes) for choice in range(len(RATIOS))]
    affordable = [genome for genome in uniform if cost(kept(genome)) <= budget]
    if not affordable:
        least = cost(kept(uniform[-1]))
        raise RecipeError(f"sparsevit: a budget of {budget:.3g} can't be met: ratios of 0.8 cost {least:.3g}")
    best = evolve(
        all_choices,
        loss,
        lambda genome: cost(kept(genome)) <= budget,
        cheapest=affordable[0],
        ordered=ordered,
        population=population,
        parents=parents,
        generations=generations,
        seed=seed,
    )
    ratio = {b: RATIOS[choice] for gene, choice in zip(genes, best.genome, strict=True) for b in gene}
    return Ratios(ratio, best.loss, RATIOS[affordable[0][0]], loss(affordable[0]))


def _num_kept(windows: int, ratio: float) -> int:
    return ceil(windows * (1 - ratio) - ROUNDING)


def _share_of_macs(blocks: Sequence[BlockView], windows: Sequence[int], kept: Mapping[int, int]) -> float:
    """Of blocks that compute some windows, of what they have with all."""
    part = sum(_macs(blocks[i], number) for i, number in kept.items())
    return part / sum(_macs(block, number) for block, number in zip(blocks, windows, strict=True))


def _macs(block: BlockView, windows: int) -> int:
    """Of a block that computes so many windows, for one image."""
    attention, window = block.attention, block.attention.window
    assert window is not None
    tokens = window.size[0] * window.size[1]
    maps = (attention.query, attention.key, attention.value, attention.proj, block.mlp.fc1, block.mlp.fc2)
    weights = sum(map_.weight.numel() for map_ in maps)
    return windows * tokens * (weights + tokens * attention.num_heads * (attention.head_dim + attention.value_dim))


def _ratios(ratio: Any) -> Any:
    """Ratios in one hashable form: a number, or pairs (block, ratio) in the order of blocks.

    Raises:
        RecipeError: neither a ratio nor a mapping from block to one.
    """
    if ratio is None or _is_ratio(ratio):
        return ratio
    if isinstance(ratio, tuple):
        ratio = dict(ratio)
    if isinstance(ratio, Mapping):
        by_block = {int(b) if isinstance(b, str) and b.isdigit() else b: x for b, x in ratio.items()}  # JSON's keys
        if all(isinstance(b, int) and not isinstance(b, bool) and b >= 0 and _is_ratio(x) for b, x in by_block.items()):
            return tuple(sorted((b, float(x)) for b, x in by_block.items()))
    raise RecipeError(
        f"sparsevit: ratio is {ratio!r}; it can be the share of windows to leave out, from 0 to less than 1, of every "
        "block (ratio: 0.3) or of some (ratio: {0: 0.4, 1: 0.4})"
    )


def _is_ratio(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < 1
