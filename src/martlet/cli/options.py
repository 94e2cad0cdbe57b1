"""Options that several verbs share, as dataclasses; `expanded` puts them into a verb's signature."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Argument, Option

from martlet.core.errors import UsageError

if TYPE_CHECKING:
    from martlet.core.model import Model
    from martlet.core.store import Artifact
    from martlet.data.images import Images

Spec = Annotated[
    str,
    Argument(
        metavar="MODEL",
        show_default=False,
        help="timm:NAME, hf:FOLDER_OR_ID, torchvision:NAME, martlet:NAME, path/to/file.py:FACTORY, "
        "or the folder of an artifact.",
    ),
]
ENGINE_NAMES = "openvino, onnxruntime or torch"
Json = Annotated[bool, Option("--json", help="Print one JSON document, and nothing else, on standard output.")]
EngineName = Annotated[str, Option(metavar="ENGINE", help=f"{ENGINE_NAMES}.")]
Threads = Annotated[int | None, Option(min=1, metavar="N", help="Cores to use; all, if not given.")]
Seed = Annotated[int, Option(min=0, metavar="N", help="Of samples, of random weights and of the order of timing.")]
Teacher = Annotated[
    str | None,
    Option(
        metavar="MODEL[=FILE]",
        show_default=False,
        help="Whose outputs a pass that trains learns, and its weights; the untouched model, if not given.",
    ),
]
Epochs = Annotated[
    float | None, Option(metavar="N", help="Of passes that train, if not the recipe's.", show_default=False)
]
Minutes = Annotated[
    float | None,
    Option(metavar="N", help="That each pass that trains may take, at most; its schedule is cut.", show_default=False),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the artifact that is at --out.")]


def _option(panel: str, metavar: str, text: str) -> Any:
    return Option(metavar=metavar, help=text, rich_help_panel=panel, show_default=False)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is loaded, and how it wants its images."""

    weights: Annotated[
        str | None,
        _option("Model", "FILE", "A .safetensors, .pth or .pt file; `pretrained`, the library's own; or `random`."),
    ] = None
    num_classes: Annotated[int | None, _option("Model", "N", "Classes, if not the library's.")] = None
    model_kwargs: Annotated[
        str | None, _option("Model", "K=V,…", "For the library's constructor: img_size=384,depth=6, or JSON.")
    ] = None
    trust_code: Annotated[
        bool,
        Option(
            "--trust-code", help="Run the Python file named, or that an artifact comes from.", rich_help_panel="Model"
        ),
    ] = False
    image_size: Annotated[str | None, _option("Preprocessing", "H[,W]", "What the model takes, in pixels.")] = None
    resize: Annotated[
        str | None,
        _option("Preprocessing", "SIDE|H,W|none", "Before the crop: the shorter side, a box, or not at all."),
    ] = None
    fit: Annotated[
        str | None, _option("Preprocessing", "HOW", "How an image meets a box: squash, cover or contain.")
    ] = None
    interpolation: Annotated[str | None, _option("Preprocessing", "NAME", "bilinear, bicubic, …")] = None
    mean: Annotated[str | None, _option("Preprocessing", "R,G,B", "Of pixels in [0, 1].")] = None
    std: Annotated[str | None, _option("Preprocessing", "R,G,B", "Of pixels in [0, 1].")] = None

    def load(self, spec: str, seed: int = 0) -> Model:
        """The model in torch.

        Raises:
            MartletError: as `martlet.load_model`, or an option that can't be read.
        """
        from martlet.source import load_model

        return load_model(
            spec,
            weights=self.weights,
            num_classes=self.num_classes,
            model_kwargs=None if self.model_kwargs is None else parse_kwargs(self.model_kwargs),
            trust_code=self.trust_code,
            preprocess=self.preprocess() or None,
            seed=seed,
        )

    def open(self, spec: str, seed: int = 0) -> Model | Artifact:
        """The model in torch; an artifact as it is, to run on its engine.

        Raises:
            MartletError: as `load`; or options for an artifact, which has everything of its own.
        """
        from martlet.core import store

        if not store.find(spec):
            return self.load(spec, seed)
        if replace(self, trust_code=False) != ModelOptions():
            raise UsageError(f"{spec} is an artifact, with its own weights, classes and preprocessing: name it alone")
        return store.load(spec)

    def preprocess(self) -> dict[str, Any]:
        """The fields of Preprocess that were given."""
        changes: dict[str, Any] = {"fit": self.fit, "interpolation": self.interpolation}
        if self.image_size is not None:
            changes["size"] = _box("--image-size", self.image_size)
        if self.mean is not None:
            changes["mean"] = _numbers("--mean", self.mean, float, (3,))
        if self.std is not None:
            changes["std"] = _numbers("--std", self.std, float, (3,))
        changes = {name: value for name, value in changes.items() if value is not None}
        if self.resize is not None:
            sides = () if self.resize == "none" else _numbers("--resize", self.resize, int, (1, 2))
            changes["resize"] = sides if len(sides) == 2 else sides[0] if sides else None
        return changes


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """On which images."""

    images: Annotated[
        str,
        _option(
            "Images",
            "PATH",
            "What is measured on: a folder of images, a .parquet or .arrow file or a folder of them, .tar shards, "
            "or martlet:digits. Labels are used if there are any.",
        ),
    ]
    class_map: Annotated[
        str | None, _option("Images", "FILE", "Class index by name, for folders that aren't in the model's order.")
    ] = None
    split: Annotated[str | None, _option("Images", "NAME", "Which part of a folder: train, test …")] = None
    limit: Annotated[
        int | None,
        Option(min=1, metavar="N", help="At most this many images.", rich_help_panel="Images", show_default=False),
    ] = None

    def open(self, seed: int = 0) -> Images:
        """The images, not read yet.

        Raises:
            DataError: as `martlet.data.open_images`.
        """
        from martlet.data import open_images

        return open_images(self.images, class_map=self.class_map, split=self.split, limit=self.limit, seed=seed)


def expanded(verb: Callable[..., int | None]) -> Callable[..., int | None]:
    """The verb with each parameter that is a dataclass of options replaced by the fields of that dataclass."""
    parameters, groups = [], {}
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(group, type)
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
                )
            )

    @functools.wraps(verb)
    def call(**given: Any) -> int | None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        return verb(**given, **made)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def parse_kwargs(text: str) -> dict[str, Any]:
    """`depth=6,img_size=[32,48],act=gelu` or a JSON object. Values are JSON, and strings where they aren't.

    Raises:
        UsageError: neither.
    """
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise UsageError(f"--model-kwargs is no JSON: {error}") from None
    pairs = [re.fullmatch(r"\s*([^\W\d]\w*)=(.*)", part) for part in re.split(r",(?=\s*\w+=)", text)]
    values = {pair[1]: _value(pair[2]) for pair in pairs if pair}
    if not all(pairs) or any(isinstance(value, str) and (not value or "," in value) for value in values.values()):
        raise UsageError(f"--model-kwargs takes name=value,name=value or a JSON object, not {text!r}")
    return values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _box(option: str, text: str) -> tuple[int, int]:
    sides = _numbers(option, text, int, (1, 2))
    return sides[0], sides[-1]


def _numbers(option: str, text: str, kind: type[int] | type[float], counts: tuple[int, ...]) -> tuple[Any, ...]:
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} takes {' or '.join(map(str, counts))} {what} with commas between, not {text!r}")
    return values
