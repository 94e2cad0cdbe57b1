"""Exits on a vision transformer: where they hang, how the model runs with them, and how their heads are trained."""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage
from martlet.functional.distillation import divergence
from martlet.nn.exit_heads import Readout
from martlet.nn.exits import Exit, has_exits, leave, top_probability
from martlet.training.objective import Batch, Objective
from martlet.training.technique import Training
from martlet.vit.view import BlockView, VitView, view

TEMPERATURE = 2.0
"""At which heads learn the model's probabilities."""
Confidence = Callable[[Sequence[Tensor], Tensor], Tensor]
"""From what the blocks around the exit were given, the last the exit's own, and its logits (B, K), to (B,)."""


class Answer(NamedTuple):
    """What an exit says of images: logits (B, K), how sure it is (B,), and the tokens (B, …, C) that it read."""

    logits: Tensor
    confidence: Tensor
    tokens: Tensor


class Run(ABC):
    """How a model with exits runs: from images (B, 3, H, W) to the logits (B, K) with which each leaves."""

    exits: Sequence[Exit]

    @abstractmethod
    def answers(self, images: Tensor) -> tuple[list[Answer], Tensor]:
        """What every exit says, and the logits with which images leave that none lets go."""

    def __call__(self, images: Tensor) -> Tensor:
        answers, later = self.answers(images)
        for exit_, (logits, confidence, _) in reversed([*zip(self.exits, answers, strict=True)]):
            later = leave(logits, confidence, later, exit_.window)
        return later


@dataclass(frozen=True, eq=False)
class ExitRun(Run):
    """Exits that read the tokens before some of the blocks, and change nothing of the model.

    points: for each exit, the modules whose inputs are the tokens that it reads; the last is its own.
    last: the last block.
    """

    module: nn.Module
    exits: Sequence[Exit]
    points: Sequence[Sequence[nn.Module]]
    last: nn.Module
    confidence: Confidence

    def answers(self, images: Tensor) -> tuple[list[Answer], Tensor]:
        seen, later = self.tokens(images)
        found = []
        for exit_, points in zip(self.exits, self.points, strict=True):
            tokens = [seen[point] for point in points]
            logits = exit_(tokens[-1])
            found.append(Answer(logits, self.confidence(tokens, logits), tokens[-1]))
        return found, later

    def tokens(self, images: Tensor) -> tuple[dict[nn.Module, Tensor], Tensor]:
        """What each point was given and the last block gave, and the logits of the model without exits."""
        seen: dict[nn.Module, Tensor] = {}
        wanted = {point for points in self.points for point in points}
        handles = [point.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]})) for point in wanted]
        handles.append(self.last.register_forward_hook(lambda m, _, y: seen.update({m: plain(y)})))
        try:
            logits = type(self.module).forward(self.module, images)
        finally:
            for handle in handles:
                handle.remove()
        return seen, logits


def plain(y: object) -> Tensor:
    """What a block gives, also where its library wraps it in a tuple."""
    return cast(Tensor, y[0] if isinstance(y, tuple) else y)


def top(tokens: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Confidence as the largest probability."""
    return top_probability(logits)


def install_(
    module: nn.Module, vit: VitView, heads: Sequence[nn.Module], after: Sequence[Sequence[int]], confidence: Confidence
) -> None:
    """Hangs exits on a model, as `exits`, and makes it run with them. No image takes one yet.

    after: for each exit, how many blocks run before the tokens that it reads; the last number is its own place.
    """
    exits = hang_(module, heads)
    run_as_(module, _run(module, vit, exits, after, confidence))


def hang_(module: nn.Module, heads: Sequence[nn.Module]) -> Sequence[Exit]:
    """Makes exits of heads, and parts of the model, as `exits`."""
    module.exits = nn.ModuleList([Exit(head.eval()) for head in heads])
    return cast(Sequence[Exit], module.exits)


def run_as_(module: nn.Module, run: Run) -> None:
    """Makes a model run so."""
    module.__dict__["exit_run"] = run
    module.forward = types.MethodType(_forward, module)  # of the module, so that a copy's is the copy's


def _forward(module: nn.Module, images: Tensor) -> Tensor:
    return cast(Run, module.exit_run)(images)


def run_of(module: nn.Module) -> Run | None:
    """How the model runs, if it has exits and isn't traced yet."""
    return module.__dict__.get("exit_run")


def _run(
    module: nn.Module, vit: VitView, exits: Sequence[Exit], after: Sequence[Sequence[int]], confidence: Confidence
) -> ExitRun:
    points = [[point(vit.blocks[n]) for n in numbers] for numbers in after]
    return ExitRun(module, exits, points, vit.blocks[-1].module, confidence)


def shapes(model: Model, vit: VitView, after: Sequence[int]) -> list[torch.Size]:
    """Of the tokens of an image (1, …, C) after so many blocks."""
    run = _run(model.module, vit, (), [[n] for n in after], top)
    with torch.no_grad():
        seen, _ = run.tokens(torch.zeros(1, 3, *model.preprocess.size))
    return [seen[points[0]].shape for points in run.points]


def point(block: BlockView) -> nn.Module:
    """The module whose input is what the block is given."""
    return block.attention.module if block.post_norm else block.norm1.module


def readout(vit: VitView, after: int) -> Readout:
    """How tokens are read after so many blocks."""
    tokens, stage = vit.tokens, vit.blocks[min(after, len(vit.blocks) - 1)].stage
    # Swin halves its grid between stages, and fills up what is odd.
    grid = tokens.grid and (-(-tokens.grid[0] // 2**stage), -(-tokens.grid[1] // 2**stage))
    return Readout(tokens.num_prefix, tokens.class_token + tokens.distillation_token, grid)


def places(name: str, after: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """After how many blocks each exit comes; at the quarters of the depth, if nothing else is said.

    Raises:
        RecipeError: an exit that is behind the last block, or a model too short for any.
    """
    found = after or tuple(sorted({depth // 4, depth // 2, 3 * depth // 4} - {0}))
    if not found:
        raise RecipeError(f"{name}: a model of {depth} block has no place for an exit before its last; it needs two")
    if found[-1] >= depth:
        raise RecipeError(
            f"{name}: after names {found[-1]}, and the model has {depth} blocks; an exit comes after 1 to {depth - 1}"
        )
    return found


def check_after(name: str, after: object) -> tuple[int, ...]:
    """Raises:
    RecipeError: not a list of rising numbers of blocks.
    """
    if isinstance(after, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in after):
        numbers = tuple(after)
        if [*numbers] == sorted({*numbers}) and min(numbers, default=1) >= 1:
            return numbers
    raise RecipeError(f"{name}: after is {after!r}; it can be a rising list of blocks, as in [3, 6, 9]")


def check_none(model: Model, name: str) -> None:
    """Raises:
    RecipeError: the model has exits.
    """
    if has_exits(model.module):
        raise RecipeError(f"{name}: {model.name} has exits already; one technique that adds exits is enough")


def check_grid(name: str, model: Model) -> None:
    """Raises:
    RecipeError: patches of which nobody knows where they are.
    """
    vit = view(model.module)
    if vit.family == "vit" and vit.tokens.grid is None:
        raise RecipeError(f"{name}: {model.name} takes any image size, so its patches have no grid; linear_exits can")


@dataclass(frozen=True, kw_only=True)
class TrainedExits(Training):
    """What all techniques share whose exits have something to train.

    Args:
        after: how many blocks run before each exit; without any, exits are at the quarters of the depth.
    """

    stage: ClassVar[Stage] = Stage.MODULE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS, Fact.ONE_EXIT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.ONE_EXIT})

    after: tuple[int, ...] = ()
    rate: float = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "after", check_after(self.name, self.after))

    def check(self, model: Model) -> None:
        check_none(model, self.name)
        places(self.name, self.after, len(view(model.module).blocks))

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        vit = view(model.module)
        record = self.plan(model, vit, places(self.name, self.after, len(vit.blocks)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.restore_(model, record)
        return record | {"training": super().apply_(model, context)}

    @abstractmethod
    def plan(self, model: Model, vit: VitView, after: Sequence[int]) -> dict[str, Any]:
        """The record from which `restore_` builds the exits, after so many blocks each."""


@dataclass(frozen=True, kw_only=True)
class HeadedExits(TrainedExits):
    """Exits with a head each, on a model whose weights stay as they are."""

    def space(self) -> Choices:
        return Choices(trains=True)

    @abstractmethod
    def heads(self, vit: VitView, after: Sequence[int], channels: Sequence[int], classes: int) -> list[nn.Module]:
        """A head for each exit. channels: of its tokens."""

    def plan(self, model: Model, vit: VitView, after: Sequence[int]) -> dict[str, Any]:
        return {"after": [*after], "channels": [shape[-1] for shape in shapes(model, vit, after)]}

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        return super().apply_(model, replace(context, teacher=None))  # the model itself is what heads learn

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        vit = view(model.module)
        heads = self.heads(vit, record["after"], record["channels"], model.num_classes)
        install_(model.module, vit, heads, [[n] for n in record["after"]], top)

    def objective(self, model: Model, context: Context) -> Objective:
        return HeadsObjective()


class HeadsObjective(Objective):
    """Every head learns what the model's last gives, and the labels, where there are any."""

    _run: ExitRun

    def groups(self, student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        return super().groups(cast(nn.Module, student.exits), weight_decay)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        for name, child in student.named_children():
            child.train(name == "exits")
        self._run = cast(ExitRun, student.exit_run)
        return self._loss(batch)

    def judge(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss; whether the model's own logits are right has not changed."""
        return self._loss(batch)

    def _loss(self, batch: Batch) -> Tensor:
        run = self._run
        with torch.no_grad():
            seen, wanted = run.tokens(batch.images)
        tokens = [seen[points[-1]] for points in run.points]
        losses = [self.learn(e(x), wanted, batch) for e, x in zip(run.exits, tokens, strict=True)]
        return torch.stack(losses).mean() + self.more(run, seen, tokens)

    def learn(self, logits: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        learned = divergence(logits, wanted, TEMPERATURE)
        if batch.labels is None:
            return learned
        return (learned + functional.cross_entropy(logits.float(), batch.labels)) / 2

    def more(self, run: ExitRun, seen: Mapping[nn.Module, Tensor], tokens: Sequence[Tensor]) -> Tensor:
        """What else is made small, from what every point was given, and the tokens that each exit reads."""
        return tokens[0].new_zeros(())
