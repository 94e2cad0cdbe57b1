"""Technique: one idea of the field, as one frozen dataclass in one file."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from martlet.core.errors import RecipeError, nearest
from martlet.core.facts import Fact
from martlet.core.kept import Kept

if TYPE_CHECKING:
    import torch

    from martlet.core.model import Model
    from martlet.core.recipe import Recipe
    from martlet.data.examples import Examples
    from martlet.merging.technique import Finetune
    from martlet.recipe_search.space import Space


class Stage(StrEnum):
    """Where a technique works. Stages follow each other, because each breaks what the one before it requires."""

    MODULE = "module"
    """On the `nn.Module`, as its library made it."""
    GRAPH = "graph"
    """On the traced graph (`torch.export`), where every library looks the same."""
    ENGINE = "engine"
    """On how the engine is told to run it."""
    ANY = "any"
    """On a module or a graph, whichever the model is by then; its values change and its structure stays."""

    @property
    def requires(self) -> frozenset[Fact]:
        return {
            "module": frozenset({Fact.MODULE}),
            "graph": frozenset({Fact.GRAPH}),
            "any": frozenset({Fact.GRAPH}),
        }.get(self.value, frozenset())

    @property
    def breaks(self) -> frozenset[Fact]:
        return {"graph": frozenset({Fact.MODULE}), "engine": frozenset({Fact.MODULE, Fact.GRAPH})}.get(
            self.value, frozenset()
        )


PRECISIONS = ("f32", "bf16", "f16")
"""What floating-point parts can be computed in."""


class Batches(Protocol):
    """Calibration images: seeded, preprocessed, and iterable again and again in bounded memory."""

    num_images: int

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields float32 (B, 3, H, W)."""
        ...


class Progress(Protocol):
    """A place to say how far long work has come; the command line draws it, the Python API may ignore it."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def leave_out(record: dict[str, Any], what: str) -> dict[str, Any]:
    """A technique's record that also tells what it didn't do, for the user to read."""
    return record | {"left_out": [*record.get("left_out", []), what]}


def silent(what: str, done: int, total: int) -> None:
    """The Progress that says nothing."""


class Scalars(Protocol):
    """A place for numbers that change while a model trains, one curve a name."""

    def __call__(self, name: str, value: float, step: int) -> None: ...


def unplotted(name: str, value: float, step: int) -> None:
    """The Scalars that keeps nothing."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A technique's part of the space of recipes: what a search may draw for it.

    settings: by field, the values that it may have.
    front: what finds, by measuring a model, the values of one more field that are worth drawing; None if there is none.
    always: it is exact, and no recipe that can have it is better without.
    follows: a fact. It is in just those recipes in which that doesn't hold any more, for without it what broke the fact
        does nothing, and it does nothing without that.
    trains: it is drawn only where there are images to train on.
    """

    settings: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    front: type[Space] | None = None
    always: bool = False
    follows: Fact | None = None
    trains: bool = False


@dataclass(frozen=True, kw_only=True)
class Int8Form:
    """The int8 quantization that an engine has fast kernels for. Declared by the engine, obeyed by the technique.

    activation_signed: inputs of Linear and convolution are s8 (else u8 with a zero point).
    attention_signed: the operands of an attention product that are no softmax output are s8 without zero point.
    add: both inputs of an addition that a convolution feeds and a convolution reads are rounded too.
    hoist: kernels pass integers through reshapes and transposes, so roundings move up to where values are computed.
    """

    activation_signed: bool = False
    attention_signed: bool = True
    add: bool = False
    hoist: bool = True


@dataclass(kw_only=True)
class Context:
    """What a technique may use besides the model: images, a seed, the engine's wishes, a place to report progress.

    engine: the name of the engine that is meant; empty if none is.
    precisions: those of PRECISIONS that the engine computes fast in on this machine; all, if no engine is meant.
    kept: where work that takes long leaves what it has done, in case it is stopped; None keeps nothing.
    apart: calibration images that no other pass learns from, for one that judges the others; `images`, if None.
    training: what models are trained on, apart from what they are tested on; None if there is none.
    teacher: whose outputs a model in training learns; the pipeline puts the untouched model here if there is none.
    finetunes: what is merged into the model.
    """

    images: Batches | None = None
    apart: Batches | None = None
    training: Examples | None = None
    teacher: Model | None = None
    finetunes: Sequence[Finetune] = ()
    seed: int = 0
    engine: str = ""
    int8: Int8Form = dataclasses.field(default_factory=Int8Form)
    precisions: tuple[str, ...] = PRECISIONS
    progress: Progress = silent
    kept: Kept | None = None
    scalars: Scalars = unplotted

    def calibration(self, technique: Technique) -> Batches:
        """The calibration images.

        Raises:
            RecipeError: there are none.
        """
        if self.images is None or self.images.num_images == 0:
            raise RecipeError(f"{technique.name} needs calibration images; give some with --calib or --images")
        return self.images


@dataclass(frozen=True, kw_only=True)
class Technique(ABC):
    """Fields are the user's choices. Class variables are what is true of the technique. Methods do the work.

    A technique is immutable: what it learned from images goes into the model's tensors and into the record that
    `apply_` returns, never into its fields.
    """

    name: ClassVar[str]
    """The registered name: also the file's name and the key in YAML."""
    stage: ClassVar[Stage]
    summary: ClassVar[str]
    """One line: what happens to the model."""
    paper: ClassVar[str] = ""
    """Authors, title, year, arXiv id. Empty for an engine setting."""
    requires: ClassVar[frozenset[Fact]] = frozenset()
    """Facts that must hold before; those of the stage are added by themselves."""
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    """Facts that no longer hold after; those of the stage are added by themselves."""
    needs_images: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.requires |= cls.stage.requires
        cls.breaks |= cls.stage.breaks

    def __or__(self, other: Technique | Recipe) -> Recipe:
        from martlet.core.recipe import Recipe

        return Recipe((self,)) | other

    def check_engine(self, context: Context) -> None:  # noqa: B027 - most techniques have nothing to check
        """Raises a MartletError, before a model is loaded, if the engine can't take this technique."""

    def check_next(self, following: Technique | None) -> None:  # noqa: B027 - most do what they do by themselves
        """Raises a RecipeError, before a model is loaded, if the pass right behind it, if any, makes nothing of it."""

    def check(self, model: Model) -> None:  # noqa: B027 - most techniques have nothing to check
        """Raises a MartletError, before anything is touched, if this model can't take the technique."""

    def space(self) -> Choices | None:
        """What `search` may draw for it; None keeps it out of searches."""
        return None

    @abstractmethod
    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        """Changes the model in place. Returns a JSON record from which `restore_` can rebuild the structure."""

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        """Rebuilds, without data, the structure that `apply_` left. Values follow from the artifact's tensors."""
        raise NotImplementedError(f"{self.name} changes structure and has no restore_")

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], where: str = "recipe") -> Technique:
        """Builds the technique from a mapping, strictly.

        Raises:
            RecipeError: an unknown key, or a value of another type than the field's.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key, value in settings.items():
            if key not in fields:
                known = ", ".join(fields) or "none"
                raise RecipeError(f"{where}: {cls.name} has no setting {key!r}{nearest(key, fields)} (known: {known})")
            default = fields[key].default
            if default is not dataclasses.MISSING and not _same_kind(value, default):
                kinds = "list" if isinstance(default, tuple) else type(default).__name__, type(value).__name__
                raise RecipeError(f"{where}: {cls.name}.{key} takes a {kinds[0]}, not {value!r} ({kinds[1]})")
        return cls(**settings)


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple):  # which YAML and JSON know as a list
        return isinstance(value, list | tuple)
    return default is None or isinstance(value, type(default))
