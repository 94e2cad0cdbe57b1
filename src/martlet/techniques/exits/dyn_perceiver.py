"""dyn_perceiver: exits that read only a small latent code beside the model, trained together with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.distillation import divergence
from martlet.nn.exit_heads import Readout
from martlet.nn.exits import Exit, top_probability
from martlet.nn.latent import Attend, Read, Shrink, Transfer
from martlet.training.objective import RATE, Batch, Objective, Teacher
from martlet.vit.exits import Answer, Run, TrainedExits, check_grid, hang_, places, readout, run_as_, shapes
from martlet.vit.view import VitView, view

CELLS = 7
"""Features are pooled to at most so many cells down and across, where a window fits evenly."""
FEWEST = 4
"""Cells that a window has to leave; a grid that only a larger window divides isn't pooled."""
HEADS = 8
"""Of attention within the code; or the most that divide its channels."""
NARROWED = 8
"""The channels of the features over those in which they attend to the code."""
EARLY, ALIKE = 0.5, 0.5
"""Weights of the losses of exits, and of what they learn from the last logits. As in the authors' scripts."""
HOST_RATE = 0.1
"""Of the learning rate, for the model's own weights, which have learned before."""


@dataclass(frozen=True, kw_only=True)
class DynPerceiver(TrainedExits):
    """Let images leave by a latent code beside the model, so that its features needn't be fit to be classified early.

    A linear head in the middle of a model asks features for what only the last are made for. Here a few tokens, the
    code, read the features before the first block and at each exit, and compute for themselves; the features read the
    code in turn; and exits stand on the code alone. Model and code are trained together, so images that don't leave
    get other logits than before: `lgvit` is the choice where they have to stay. Learns more slowly than heads do, since
    all weights move: give it labels, and epochs. No image takes an exit before thresholds are set (`deer`).

    Args:
        tokens: of the code at first; half as many after each exit.
        depth: blocks in which the code attends to itself, each time it has read.
        rate: the highest learning rate, of what is new; a tenth of it for the model's own weights.

    Shape: none changes. The logits are those of the exit at which an image leaves.
    Needs: images; without labels, the untouched model's answers are learned. A vision transformer that computes all
        tokens, on a grid, with two blocks or more; Swin too.
    Cost: training of the model; at run time, for each reading, about (98 + 16 n) C² MACs with n tokens in the code, and
        2.25 C² for each of the model's tokens.
    Paper: Han et al., Dynamic Perceiver, 2023, arXiv 2306.11248.
    Differs: known from the paper's abstract and the authors' code. The host is a transformer of any kind, where theirs
        are networks of convolutions; an exit stands at each reading but the first, theirs only before the last two of
        four stages; the code is smaller and less deep, as transformers of this size have it. The last logits are the
        model's own plus those of the code, which a classifier of both together can also give; features don't read the
        code once more before it. What features read is nothing at first, so training begins with the untouched model.
        Its weights learn at a tenth of the rate.
    Raises: RecipeError for blocks that aren't there, a model that has exits, patches without a grid, a code too small
        to be halved, or a setting of training out of range; SourceError for a model that is no vision transformer; and
        as the loop does.
    """

    name: ClassVar[str] = "dyn_perceiver"
    summary: ClassVar[str] = "early exits on a latent code beside the model, trained with it"
    paper: ClassVar[str] = "Han et al., Dynamic Perceiver for Efficient Visual Recognition, 2023, arXiv 2306.11248"
    requires: ClassVar[frozenset[Fact]] = TrainedExits.requires | {Fact.ALL_TOKENS}

    tokens: int = 32
    depth: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "depth"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)}; it has to be 1 or more")
        if self.batch < 2:
            raise RecipeError(f"{self.name}: batch is {self.batch}; its batch norms need two images or more")

    def check(self, model: Model) -> None:
        super().check(model)
        check_grid(self.name, model)
        exits = len(places(self.name, self.after, len(view(model.module).blocks)))
        if self.tokens < 2**exits:
            raise RecipeError(
                f"{self.name}: tokens is {self.tokens}, which can't be halved at each of {exits} exits; give "
                f"{2**exits} or more"
            )

    def plan(self, model: Model, vit: VitView, after: Sequence[int]) -> dict[str, Any]:
        found = shapes(model, vit, [0, *after])
        grids = []
        for n, shape in zip([0, *after], found, strict=True):
            grid = shape[1:3] if len(shape) == 4 else readout(vit, n).grid  # (B, H, W, C), or (B, N, C)
            assert grid is not None
            grids.append([*map(int, grid)])
        return {"after": [*after], "channels": [shape[-1] for shape in found], "grids": grids}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        vit, module = view(model.module), model.module
        module.latent = Branch(
            record["channels"], [(h, w) for h, w in record["grids"]], self.tokens, self.depth, model.num_classes
        )
        dims = record["channels"][1:]
        heads = [nn.Linear(dim if i == 0 else 2 * dim, model.num_classes) for i, dim in enumerate(dims)]
        exits, numbers = hang_(module, heads), [0, *record["after"]]
        blocks = [vit.blocks[n].module for n in numbers]
        reads = [readout(vit, n)._replace(grid=(h, w)) for n, (h, w) in zip(numbers, record["grids"], strict=True)]
        run_as_(module, LatentRun(module, module.latent.eval(), exits, blocks, reads))

    def objective(self, model: Model, context: Context) -> Objective:
        assert context.teacher is not None
        return Together(self.smoothing, Teacher(context.teacher, model))


class Branch(nn.Module):
    """All that is beside the host but the exits: the code, and how it reads, is read, and ends.

    channels, grids: of the features at each reading.
    """

    def __init__(
        self,
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        tokens: int,
        depth: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.empty(1, tokens, channels[0]))
        nn.init.trunc_normal_(self.code, std=0.02)
        self.read = nn.ModuleList(
            Read(dim, (cells(down), cells(across)), depth, next(n for n in range(HEADS, 0, -1) if dim % n == 0))
            for dim, (down, across) in zip(channels, grids, strict=True)
        )
        self.shrink = nn.ModuleList(Shrink(tokens >> i, dim, out) for i, (dim, out) in enumerate(pairwise(channels)))
        self.write = nn.ModuleList(Attend(dim, other_dim=dim, inner=max(dim // NARROWED, 1)) for dim in channels[1:])
        self.transfer = nn.ModuleList(Transfer(num_classes, dim) for dim in [*channels[2:], channels[-1]])
        self.norm = nn.BatchNorm1d(2 * channels[-1])
        self.fc = nn.Linear(2 * channels[-1], num_classes)
        ends = [self.fc]
        for write in cast(Sequence[Attend], self.write):
            ends += [write.proj, write.mlp.fc2]
        for last in ends:  # the model is what it was until they learn
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


def cells(side: int) -> int:
    """To how many cells a side of so many patches is pooled: the most that are CELLS at most."""
    pooled = next(side // k for k in range(1, side + 1) if side % k == 0 and side // k <= CELLS)
    return pooled if pooled >= min(FEWEST, side) else side


@dataclass(frozen=True, eq=False)
class LatentRun(Run):
    """The host, and the code beside it.

    blocks: before which the code reads. readouts: what it reads of their tokens.
    """

    module: nn.Module
    branch: Branch
    exits: Sequence[Exit]
    blocks: Sequence[nn.Module]
    readouts: Sequence[Readout]

    def answers(self, images: Tensor) -> tuple[list[Answer], Tensor]:
        codes, logits, _, last = self.outputs(images)
        found = zip(logits, codes, strict=True)
        return [Answer(each, top_probability(each), code) for each, code in found], last

    def outputs(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """The code (B, n, C) and the logits (B, K) at every exit, the host's own logits, and the last of all."""
        branch, codes, logits = self.branch, list[Tensor](), list[Tensor]()

        def before(i: int, x: Tensor) -> Tensor:
            if i == 0:
                code = branch.code.expand(x.shape[0], -1, -1)
            else:
                code = branch.shrink[i - 1](codes[-1])
                x = branch.write[i - 1](x.flatten(1, -2), code).unflatten(1, x.shape[1:-1])
            codes.append(branch.read[i](code, self._features(i, x)))
            if i:
                logits.append(self.exits[i - 1](self._thought(codes[-1], logits)))
            return x

        def hook(i: int) -> Callable[[nn.Module, Any], Any]:
            return lambda _, args: (before(i, args[0]), *args[1:])

        hooks = [block.register_forward_pre_hook(hook(i)) for i, block in enumerate(self.blocks)]
        try:
            own = type(self.module).forward(self.module, images)
        finally:
            for handle in hooks:
                handle.remove()
        last = own + branch.fc(branch.norm(self._thought(codes[-1], logits)))
        return codes[1:], logits, own, last

    def _features(self, i: int, x: Tensor) -> Tensor:
        """(B, …, C) -> (B, C, H, W)."""
        _, patches = self.readouts[i].split(x)
        return patches.mT.unflatten(2, self.readouts[i].places(x))

    def _thought(self, code: Tensor, logits: Sequence[Tensor]) -> Tensor:
        """What is classified: the mean of the code, and what the exit before thought, if there was one."""
        mean = code.mean(1)
        return torch.cat([mean, self.branch.transfer[len(logits) - 1](logits[-1])], 1) if logits else mean


class Together(Objective):
    """All logits learn what is right, and those before the last learn the last besides."""

    def __init__(self, smoothing: float, teacher: Teacher) -> None:
        super().__init__()
        self.smoothing, self._teacher = smoothing, teacher

    def groups(self, student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        new = {id(p) for part in (student.latent, student.exits) for p in cast(nn.Module, part).parameters()}
        found = []
        for group in super().groups(student, weight_decay):
            for ours, rate in ((True, 1.0), (False, HOST_RATE)):
                kept = [p for p in group["params"] if (id(p) in new) == ours]
                found += [{**group, "params": kept, RATE: rate}] if kept else []
        return found

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        _, exits, own, last = cast(LatentRun, student.exit_run).outputs(batch.images)
        right = self._right(batch)
        early = torch.stack([self._error(each, right) for each in exits]).sum()
        alike = torch.stack([divergence(each, last.detach()) for each in (*exits, own)]).sum()
        return self._error(own, right) + self._error(last, right) + EARLY * early + ALIKE * alike

    def judge(self, logits: Tensor, batch: Batch) -> Tensor:
        return self._error(logits, self._right(batch))

    def _right(self, batch: Batch) -> Tensor:
        """Labels (B,) or (B, K); the untouched model's probabilities where there are none."""
        return self._teacher(batch.images).float().softmax(1) if batch.labels is None else batch.labels

    def _error(self, logits: Tensor, right: Tensor) -> Tensor:
        smoothing = self.smoothing if right.ndim == 1 else 0.0
        return functional.cross_entropy(logits.float(), right, label_smoothing=smoothing)
