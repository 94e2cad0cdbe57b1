"""Fewer tokens from a block on: the one mechanism under every technique that reduces them.

`install_` makes the first block that reduces run all blocks from there to the last, and these pass on what they get. So
what travels between blocks besides x, the sizes of tokens, is a local variable and no state of the model. The modules
stay where they were, with their names and parameters, and so does the view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.functional.fusion import Fusion
from martlet.functional.tokens import Pairs, Reduction, cosine_similarity, merge, pick, unmerge
from martlet.nn.low_rank import LowRankLinear
from martlet.vit.parts import before, linear, mlp, project, residual, split_heads, take_over_, through
from martlet.vit.view import AttentionView, BlockView, LinearView


class Patches(NamedTuple):
    """Which tokens are patches.

    first: the number of the first; before it come class, distillation and register tokens, which are never reduced.
    grid: patches (down, across) while they stand in row order; None after a reduction.
    """

    first: int
    number: int
    grid: tuple[int, int] | None

    @property
    def tokens(self) -> range:
        return range(self.first, self.first + self.number)

    def squares(self) -> list[int]:
        """One patch in each square of four; every fourth token, where patches have no places any more.

        Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023, arXiv 2303.17604, section 4.
        """
        if self.grid is None:
            return [*self.tokens[::4]]
        width = self.grid[1]
        return [self.first + i for i in range(self.number) if i // width % 2 == 0 and i % width % 2 == 0]


class Tokens(NamedTuple):
    """What a reduction may look at: the tokens of a block after its attention was added.

    x: (B, N, C). before: (B, N, C), without the attention. query, key, value: (B, N, H D), as the projections give
    them, before any norm of heads.
    log_size: (B, N), how many patches each token stands for; None while each stands for itself.
    """

    block: BlockView
    x: Tensor
    before: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    log_size: Tensor | None
    patches: Patches

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, H D) -> (B, N, H, D)."""
        return x.unflatten(-1, (self.block.attention.num_heads, self.block.attention.head_dim))

    def likeness(self, first: Sequence[int], second: Sequence[int]) -> Tensor:
        """The cosine (B, P, Q) of the attention keys, averaged over heads, of tokens of the first list and the second.

        Source: Bolya et al., Token Merging, 2023, arXiv 2210.09461, section 3.
        """
        keys = functools.reduce(torch.add, self.key.split(self.block.attention.head_dim, -1))  # (B, N, D)
        return cosine_similarity(pick(keys, first), pick(keys, second))

    def class_scores(self) -> Tensor:
        """What the class token's query scores with each token's key (B, N, H), sizes included: its log attention, but
        for a constant.

        Computed anew, from one query, so that the block's own attention stays a whole that engines have a kernel for.
        """
        attention = self.block.attention
        query = through(attention.query_norm, self.heads(self.query[:, :1]))  # (B, 1, H, D)
        key = through(attention.key_norm, self.heads(self.key))  # (B, N, H, D)
        scores = (query * key).sum(-1) * attention.scale  # (B, N, H)
        return scores if self.log_size is None else scores + self.log_size[..., None]

    def class_attention(self) -> Tensor:
        """Mean over heads of how much the class token attends to each token, (B, N)."""
        return self.class_scores().softmax(1).mean(-1)

    def class_log_attention(self) -> Tensor:
        """Mean over heads of its logarithm (B, N), but for a constant."""
        attention = self.block.attention
        if attention.query_norm is not None or attention.key_norm is not None:
            return self.class_scores().mean(-1)
        scores = (self.query[:, :1] * self.key).sum(-1) * (attention.scale / attention.num_heads)  # all heads at once
        return scores if self.log_size is None else scores + self.log_size


Restore = Callable[[Tensor], Tensor]
"""From the tokens that are left (B, M, C) to all that there were (B, N, C)."""


class Decision(NamedTuple):
    """What a technique decides: the reduction, and the weights (B, N) of its means.

    weights: None weighs tokens by size, as a `proportional` run needs it, whose sizes these sums are.
    restore: how tokens are given back; None gives each the value of what it joined.
    pairs: finds which token joins which, where that is known.
    change: from tokens (B, N, C) and their sizes (B, N), unless each counts as one, to what is merged in their place.
    """

    reduction: Reduction
    weights: Tensor | None = None
    restore: Restore | None = None
    pairs: Callable[[], Pairs] | None = None
    change: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def made(self, block: BlockView) -> Reduced:
        spread = functools.partial(unmerge, reduction=self.reduction)
        return Reduced(block, self.reduction.num_tokens, self.restore or spread, spread)


class Reduced(NamedTuple):
    """A reduction that was made: in which block, how many tokens were left, and how they are given back.

    spread: gives each token the value of what it became part of, and 0 if it was dropped, whatever `restore` does.
    """

    block: BlockView
    num_tokens: int
    restore: Restore
    spread: Restore


Decide = Callable[[Tokens], Decision]
Pool = Callable[[Tensor, Tensor | None, Patches], Decision]
"""From the tokens (B, N, C) before a block, their sizes (B, N) unless each counts as one, and the patches."""
Fuse = Callable[[Tensor, Tensor, Tensor, Patches], Fusion]
"""From the tokens (B, N, C) before a block, how much all look at each (B, N), sizes (B, N), and the patches."""


@dataclass(frozen=True, eq=False)
class TokenRun:
    """Runs blocks one after the other, from tokens (B, N, C) to tokens.

    decide: by position in `blocks`, what happens between a block's attention and its MLP.
    proportional: add the log of each token's size to the scores of the blocks that follow (Bolya et al., Token Merging,
        2023, arXiv 2210.09461, equation 1), so that a merged token weighs as much as those it stands for.
    num_read: the last block computes only so many leading tokens, the others being read by nobody; None for all, which
        are then given back in their original number: each takes the value of its group.
    ahead: by position, what fuses tokens before a block, by that block's attention of all of them.
    pool: by position, what happens before a block, by its tokens alone.
    back: positions of blocks that compute all tokens again: those that were taken away are given back before them.
    Dropout inside attention isn't run; the model is for inference. What else a block is called with isn't used: Hugging
    Face gives masks that mask nothing, and one that did would be found by `run_from_parts_`.
    """

    blocks: tuple[BlockView, ...]
    patches: Patches
    decide: Mapping[int, Decide] = field(default_factory=dict)
    proportional: bool = True
    num_read: int | None = None
    ahead: Mapping[int, Fuse] = field(default_factory=dict)
    pool: Mapping[int, Pool] = field(default_factory=dict)
    back: frozenset[int] = frozenset()

    def __call__(self, x: Tensor, *others: object, **more: object) -> Tensor:
        x, done, _ = self.reduced(x)
        return x if self.num_read else given_back(x, done)

    def reduced(self, x: Tensor) -> tuple[Tensor, Sequence[Reduced], list[Sequence[Reduced]]]:
        """What is left of the tokens after the last block, and the reductions that took the others away; and after each
        reduction, all that had taken some away by then.
        """
        size = log_size = None
        patches, made = self.patches, list[Sequence[Reduced]]()
        done: tuple[Reduced, ...] = ()
        for i, block in enumerate(self.blocks):
            queries = self.num_read if i == len(self.blocks) - 1 else None
            if i in self.back:
                x, size, log_size, patches, done = given_back(x, done), None, None, self.patches, ()
            if i in self.pool:
                decision = self.pool[i](x, size, patches)
                x, size, log_size, patches = self._merged(x, size, patches, decision)
                done = (*done, decision.made(block))
                made.append(done)
            earlier = x
            if i in self.ahead:
                fuse = functools.partial(_fuse, block, x, size, self.ahead[i], patches)
                fused: _Fused = block.attention.module(before(block, x), log_size, ahead=fuse)
                x = fused.x + residual(block, fused.attended, first=True)
                patches = Patches(patches.first, x.shape[1] - patches.first, None)
                size, log_size = fused.size, fused.size.log()
                done = (*done, Reduced(block, x.shape[1], fused.fusion.spread, fused.fusion.spread))
                made.append(done)
                x = mlp(block, x)
                continue
            attended, query, key, value = block.attention.module(before(block, x), log_size, queries)
            x = x[:, :queries] if queries else x
            x = x + residual(block, attended, first=True)
            if i in self.decide:
                decision = self.decide[i](Tokens(block, x, earlier, query, key, value, log_size, patches))
                x, size, log_size, patches = self._merged(x, size, patches, decision)
                done = (*done, decision.made(block))
                made.append(done)
            x = mlp(block, x)
        return x, done, made

    def _merged(
        self, x: Tensor, size: Tensor | None, patches: Patches, decision: Decision
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Patches]:
        """What is left: tokens, their sizes and the logarithm of these, if they count, and patches."""
        if decision.change is not None:
            x = decision.change(x, size)
        x, total = merge(x, decision.reduction, size if decision.weights is None else decision.weights)
        left = Patches(patches.first, x.shape[1] - patches.first, None)
        return (x, total, total.log(), left) if self.proportional else (x, None, None, left)


def given_back(x: Tensor, done: Sequence[Reduced]) -> Tensor:
    """All tokens that there were, from those that are left."""
    for reduced in reversed(done):
        x = reduced.restore(x)
    return x


@dataclass(frozen=True, eq=False)
class Attend:
    """A block's attention, with sizes of tokens in its scores and for some leading queries only."""

    attention: AttentionView

    def __call__(
        self,
        x: Tensor,
        log_size: Tensor | None = None,
        queries: int | None = None,
        *,
        ahead: Callable[[Tensor], _Fused] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | _Fused:
        """From x (B, N, C) to its attention (B, queries or N, C), and query, key and value (B, N, H D).

        ahead: fuses tokens by their attention (B, H, N, N); then what is fused is returned, its attention included.
        """
        attention = self.attention
        heads = functools.partial(split_heads, attention)
        if ahead is not None:
            query, key = (_rows_of(each, x) for each in (attention.query, attention.key))
            scores = through(attention.query_norm, heads(query)) @ through(attention.key_norm, heads(key)).mT
            scores = scores * attention.scale
            return ahead((scores if log_size is None else scores + log_size[:, None, None]).softmax(-1))
        (query, key, value), (by_head, keys, values) = project(attention, x)
        out = functional.scaled_dot_product_attention(
            through(attention.query_norm, by_head if queries is None else by_head[:, :, :queries]),
            through(attention.key_norm, keys),
            values,
            attn_mask=None if log_size is None else log_size[:, None, None],
            scale=attention.scale,
        )
        return self.projected(out.transpose(1, 2).flatten(2)), query, key, value  # (B, N, H D)

    def value(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, H D)."""
        return _rows_of(self.attention.value, x)

    def weighed(self, weights: Tensor, value: Tensor) -> Tensor:
        """The mean under attention weights (B, H, N, N) of values (B, N, H D)."""
        return (weights @ split_heads(self.attention, value)).transpose(1, 2).flatten(2)  # (B, N, H D)

    def projected(self, x: Tensor) -> Tensor:
        return linear(self.attention.proj, through(self.attention.norm, x))


class _Fused(NamedTuple):
    """Fused tokens (B, M, C), their attention (B, M, C), and their sizes (B, M)."""

    x: Tensor
    attended: Tensor
    size: Tensor
    fusion: Fusion


def _fuse(block: BlockView, x: Tensor, size: Tensor | None, fuse: Fuse, patches: Patches, weights: Tensor) -> _Fused:
    """Fuses tokens (B, N, C) before their values are computed, and the attention weights (B, H, N, N) with them.

    Columns of what is fused are added up, and rows averaged, as the tokens are: by how much they are looked at, times
    size. That is to spread the fused values, and to average what comes out.
    Source: Lee et al., Multi-criteria Token Fusion, 2024, arXiv 2403.10030, section 3.3.
    """
    attend = Attend(block.attention)
    seen = weights.mean((1, 2))  # (B, N)
    size = torch.ones_like(seen) if size is None else size
    fusion = fuse(x, seen, size, patches)
    share = (seen * size)[..., None]  # (B, N, 1)
    total = fusion.total(share)  # (B, M, 1)
    fused = fusion.total(x * share) / total
    out = attend.weighed(weights, fusion.spread(attend.value(before(block, fused))))
    out = fusion.total(out * share) / total
    return _Fused(fused, attend.projected(out), fusion.total(size[..., None])[..., 0], fusion)


def installed(blocks: Sequence[BlockView]) -> TokenRun | None:
    """The run that does the work of blocks from one of them on; None if they do their own."""
    runs = (block.module.__dict__.get("forward") for block in blocks)
    return next((run for run in runs if isinstance(run, TokenRun)), None)


def install_(run: TokenRun) -> None:
    """Makes the first block of the run do the work of all. What was installed before is replaced."""
    take_over_(run.blocks, run, Attend)


def _rows_of(map_: LinearView, x: Tensor) -> Tensor:
    """The map's own rows alone, in floating point whatever comes: a product that quantizers of Linears leave alone."""
    if map_.weight_name == "weight" and not isinstance(map_.module, nn.Linear | LowRankLinear):
        return linear(map_, x)[..., map_.rows]  # an update is being learned beside it
    weight = map_.weight.mT.expand(x.shape[0], -1, -1)  # (B, C, O)
    out = torch.baddbmm(x.new_zeros(1, 1, 1), x, weight)
    return out if map_.bias is None else out + map_.bias
