"""Recipe: an ordered tuple of techniques, as Python, as strict YAML, and as one line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from martlet.core import registry
from martlet.core.errors import RecipeError, nearest
from martlet.core.facts import ALL_FACTS, Fact
from martlet.core.technique import Technique

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "recipes"
BITS = re.compile(r"(?P<name>.+)-w(?P<weight>\d)a(?P<activation>\d)")
"""A shipped recipe with the bits of weights and activations."""


@dataclass(frozen=True)
class Recipe:
    """Techniques in the order in which they are applied. `a | b` joins two; equality is by content."""

    passes: tuple[Technique, ...] = ()

    def __or__(self, other: Recipe | Technique) -> Recipe:
        return Recipe(self.passes + (other.passes if isinstance(other, Recipe) else (other,)))

    def __str__(self) -> str:
        return (
            " | ".join(
                t.name + (f"({', '.join(f'{k}={v}' for k, v in s.items())})" if (s := t.settings()) else "")
                for t in self.passes
            )
            or "none"
        )

    @property
    def needs_images(self) -> bool:
        return any(technique.needs_images for technique in self.passes)

    def facts(self, start: frozenset[Fact] = ALL_FACTS) -> frozenset[Fact]:
        """What is still true after every pass, from what is true at the start.

        Raises:
            RecipeError: a pass requires a fact that an earlier one breaks; the message says which and what to do. Or
                a pass does nothing without another right behind it.
        """
        facts, breakers = start, {}
        for i, technique in enumerate(self.passes):
            technique.check_next(self.passes[i + 1] if i + 1 < len(self.passes) else None)
            me = f"passes[{i}] {technique.name}"
            for fact in sorted(technique.requires - facts):
                if fact not in breakers:
                    raise RecipeError(f"{me} requires '{fact}', which this model doesn't have")
                j, breaker = breakers[fact]
                cure = (
                    "one of them is enough"
                    if breaker.name == technique.name
                    else "leave one of the two out"
                    if technique.breaks & breaker.requires  # so they can't stand the other way round either
                    else f"move {technique.name} before it"
                )
                raise RecipeError(f"{me} requires '{fact}', which passes[{j}] {breaker.name} breaks; {cure}")
            for fact in technique.breaks & facts:
                breakers[fact] = (i, technique)
            facts -= technique.breaks
        return facts

    def digest(self) -> str:
        """16 hex digits that change with any pass or setting, defaults written out."""
        return hashlib.sha256(json.dumps([FORMAT, self._data(full=True)], sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump({"martlet": FORMAT, "passes": self._data()}, sort_keys=False)

    def _data(self, full: bool = False) -> list[Any]:
        def settings(t: Technique) -> dict[str, Any]:
            return {f.name: getattr(t, f.name) for f in fields(t)} if full else t.settings()

        return [{t.name: s} if (s := settings(t)) else t.name for t in self.passes]

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        """Reads a recipe; refuses what it doesn't know.

        Raises:
            RecipeError: not YAML, another format, a key that stands twice, an unknown key or technique, a bad value.
        """
        try:
            data = yaml.load(text, _StrictLoader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that can't be
            raise RecipeError(f"{where} is not YAML: {str(error).splitlines()[0]}") from None
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"{where} must be a mapping with the keys martlet and passes")
        for key in data:
            if key not in ("martlet", "passes"):
                raise RecipeError(f"{where} has an unknown key {key!r}{nearest(str(key), ['martlet', 'passes'])}")
        if data.get("martlet") != FORMAT or data.get("martlet") is True:
            raise RecipeError(f"{where}: its first line must be `martlet: {FORMAT}`, not {data.get('martlet')!r}")
        passes = [] if data.get("passes") is None else data["passes"]
        if not isinstance(passes, list):
            raise RecipeError(f"{where}: passes must be a list")
        return cls(tuple(_pass(item, f"{where}: passes[{i}]") for i, item in enumerate(passes)))

    @classmethod
    def load(cls, spec: str) -> Recipe:
        """`int8` (shipped), `path/to/recipe.yaml`, a technique's name, `none`, or several joined by `|`.

        Alone, a name is a shipped recipe's first; joined, a technique's. `repq-vit-w4a6` is the shipped `repq-vit` with
        weights of 4 bits and activations of 6.

        Raises:
            RecipeError: nothing of that name, or a recipe without bits to set.
        """
        if spec.endswith((".yaml", ".yml")):
            try:
                return cls.from_yaml(Path(spec).read_text(encoding="utf-8"), spec)
            except OSError as error:
                raise RecipeError(f"can't read the recipe {spec}: {error.strerror}") from None
            except UnicodeDecodeError:
                raise RecipeError(f"the recipe {spec} is no text in UTF-8") from None
        recipe, names = cls(), [part.strip() for part in spec.split("|")]
        for name in names:
            if name in shipped() and not (len(names) > 1 and name in registry.entries()):
                recipe |= cls.from_yaml((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"), name)
            elif name in registry.entries():
                recipe |= registry.technique(name)()
            elif (bits := BITS.fullmatch(name)) and bits["name"] in shipped():
                text = (SHIPPED / f"{bits['name']}.yaml").read_text(encoding="utf-8")
                recipe |= cls.from_yaml(text, name).with_bits(int(bits["weight"]), int(bits["activation"]))
            elif name != "none":
                known = [*shipped(), *registry.entries(), "none"]
                raise RecipeError(f"there is no recipe {name!r}{nearest(name, known)} (see: martlet list recipes)")
        return recipe

    def with_bits(self, weight: int, activation: int) -> Recipe:
        """The recipe with other bits in the passes that have `weight_bits` and `activation_bits`.

        Raises:
            RecipeError: none has, or bits that one can't have.
        """
        bits = {"weight_bits": weight, "activation_bits": activation}
        ours = [all(hasattr(technique, name) for name in bits) for technique in self.passes]
        if not any(ours):
            raise RecipeError(
                f"no pass of {', '.join(t.name for t in self.passes)} takes weight_bits and activation_bits"
            )
        return Recipe(
            tuple(replace(t, **bits) if has else t for t, has in zip(self.passes, ours, strict=True))  # type: ignore[type-var]
        )


def shipped() -> tuple[str, ...]:
    """Names of the recipes that come with Martlet."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def join(recipes: Iterable[Recipe]) -> Recipe:
    """All passes, in order."""
    return Recipe(tuple(technique for recipe in recipes for technique in recipe.passes))


class _StrictLoader(yaml.SafeLoader):
    """YAML's own types only, and no key that stands twice, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise RecipeError(f"the key {key.value!r} stands twice, in lines {lines[key.value]} and {line}")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _pass(item: Any, where: str) -> Technique:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(item) != 1:
        raise RecipeError(f"{where} must be a technique's name, or one name with its settings")
    [(name, settings)] = item.items()
    settings = {} if settings is None else settings
    if not isinstance(name, str):
        raise RecipeError(f"{where}: a technique's name is a word, not {name!r}")
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise RecipeError(f"{where} {name}: settings must be a mapping")
    try:
        return registry.technique(name).from_settings(settings, where)
    except RecipeError as error:
        raise error if str(error).startswith(where) else RecipeError(f"{where}: {error}") from None
