"""What all techniques share that reduce tokens: the schedule, its checks, and how it is applied and restored.

The names of the mechanism can be had from here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage, Technique
from martlet.vit.reading import Reading, Taken, check_global, patches_of, reading, run_from_parts_
from martlet.vit.token_run import Decide, Decision, Fuse, Patches, TokenRun, Tokens, install_, installed
from martlet.vit.view import VitView, view

__all__ = [
    "Decide",
    "Decision",
    "Fuse",
    "Patches",
    "Reading",
    "Taken",
    "TokenReduction",
    "TokenRun",
    "Tokens",
    "check_global",
    "in_stages",
    "install_",
    "installed",
    "patches_of",
    "reading",
    "run_from_parts_",
]


@dataclass(frozen=True, kw_only=True)
class TokenReduction(Technique):
    """What all techniques share that leave later blocks fewer tokens. See `r` in any of them."""

    stage: ClassVar[Stage] = Stage.MODULE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.ALL_TOKENS, Fact.ONE_EXIT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS})
    proportional: ClassVar[bool] = True
    """Later attention knows how many patches a token stands for."""
    paired: ClassVar[bool] = False
    """Its decisions say which token joins which, for techniques that change tokens before they are merged."""
    drawn: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values of its own settings that a search draws from, besides schedules."""

    r: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", _schedule(self.name, self.r))

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        return settings | {"r": dict(self.r)} if isinstance(self.r, tuple) else settings

    def asks_class_token(self) -> bool:
        """Whether it needs to know what the class token attends to."""
        return False

    def decide(self, r: int) -> Decide:
        """What removes r tokens. Not asked where `run` is another."""
        raise NotImplementedError(f"{self.name} says neither how it decides nor how it runs")

    @abstractmethod
    def most(self, patches: Patches) -> int:
        """How many tokens can go at once."""

    @abstractmethod
    def default(self, patches: Patches, depth: int) -> dict[int, int]:
        """The schedule without one."""

    def space(self) -> Choices | None:
        from martlet.recipe_search.tokens import Tokens as Schedules

        return Choices(settings=self.drawn, front=Schedules)

    def check(self, model: Model) -> None:
        self._plan(model, view(model.module))

    def run(self, vit: VitView, found: Reading, schedule: Mapping[int, int]) -> TokenRun:
        """What runs the blocks from the first that reduces on. schedule: tokens removed by block, of at least one."""
        first = min(schedule)
        decide = {block - first: self.decide(r) for block, r in schedule.items()}
        patches = patches_of(vit, found.num_tokens)
        return TokenRun(vit.blocks[first:], patches, decide, self.proportional, found.num_read)

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        vit = view(model.module)
        found, schedule = self._plan(model, vit)
        record = {"removed": [*map(list, schedule.items())], "num_tokens": found.num_tokens, "num_read": found.num_read}
        if schedule:
            run_from_parts_(model, vit, min(schedule), self.name)
            self.restore_(model, record)
        return record

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        schedule = dict(record["removed"])
        if schedule:
            install_(self.run(view(model.module), Reading(record["num_tokens"], record["num_read"]), schedule))

    def _plan(self, model: Model, vit: VitView) -> tuple[Reading, dict[int, int]]:
        """What the model reads, and the tokens removed by block, those that can change nothing left out.

        Raises:
            SourceError: windows. RecipeError: a block that isn't there, or more tokens than there are.
        """
        check_global(vit, self.name)
        found, depth = reading(model, vit), len(vit.blocks)
        patches = patches_of(vit, found.num_tokens)
        if self.r is None:
            schedule = self.default(patches, depth)
        elif isinstance(self.r, int):
            schedule = dict.fromkeys(range(depth), self.r)
        else:
            schedule = dict(self.r)
        kept: dict[int, int] = {}
        for block, r in sorted(schedule.items()):
            if block >= depth:
                raise RecipeError(f"{self.name}: r names block {block}; {model.name} has the blocks 0 to {depth - 1}")
            if r == 0 or (block == depth - 1 and found.num_read):  # nobody reads what it would change
                continue
            name = vit.blocks[block].name
            if self.asks_class_token() and not vit.tokens.class_token:
                raise RecipeError(
                    f"{self.name} asks at {name} what the class token attends to, and {model.name} has none; "
                    "tome and tps with informativeness 0 need none"
                )
            if r > (most := self.most(patches)):
                raise RecipeError(
                    f"{self.name}: r removes {r} tokens at {name}, where {patches.number} patches are left; at most "
                    f"{most} of them can go there"
                )
            kept[block] = r
            patches = Patches(patches.first, patches.number - r, None)
        return found, kept


def in_stages(patches: Patches, depth: int) -> dict[int, int]:
    """Three tenths of the patches that are left, at one, two and three quarters of the blocks."""
    schedule, left = {}, patches.number
    for block in sorted({depth // 4, depth // 2, 3 * depth // 4}):
        schedule[block] = 3 * left // 10
        left -= schedule[block]
    return schedule


def _schedule(name: str, r: Any) -> Any:
    """A schedule in one hashable form: a number, or pairs (block, tokens) in the order of blocks.

    Raises:
        RecipeError: neither a number of tokens nor a mapping from block to one.
    """
    if r is None or _is_count(r):
        return r
    if isinstance(r, tuple):
        r = dict(r)
    if isinstance(r, Mapping):
        by_block = {
            int(b) if isinstance(b, str) and b.isdigit() else b: n for b, n in r.items()
        }  # JSON's keys are text
        if all(map(_is_count, (*by_block, *by_block.values()))):
            return tuple(sorted(by_block.items()))
    raise RecipeError(
        f"{name}: r is {r!r}; it can be the tokens to remove in every block (r: 8), or in some (r: {{4: 64, 8: 32}})"
    )


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0
