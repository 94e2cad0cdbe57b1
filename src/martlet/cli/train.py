"""`martlet train`: a model and images in, a trained model out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Context, Option

from martlet.cli.options import Epochs, Json, Minutes, ModelOptions, Overwrite, Seed, Spec, Teacher
from martlet.cli.stop import Stopped
from martlet.cli.terminal import emit, facts, note, show, working
from martlet.core.errors import UsageError
from martlet.core.kept import Kept
from martlet.core.technique import Scalars, unplotted

if TYPE_CHECKING:
    from martlet.core.recipe import Recipe
    from martlet.core.store import Artifact


def train(
    ctx: Context,
    model: Spec,
    images: Annotated[
        str,
        Option(metavar="PATH", help="What it is trained on, never what it is tested on.", show_default=False),
    ],
    out: Annotated[Path, Option(metavar="DIR", help="The artifact folder to write.", show_default=False)],
    model_options: ModelOptions,
    recipe: Annotated[
        str,
        Option(metavar="RECIPE", help="finetune, distill, or several joined by `|` of which one trains; or a file."),
    ] = "finetune",
    teacher: Teacher = None,
    epochs: Epochs = None,
    minutes: Minutes = None,
    split: Annotated[
        str | None, Option(metavar="NAME", help="Which part of a folder: train, test …", show_default=False)
    ] = None,
    class_map: Annotated[
        str | None,
        Option(metavar="FILE", help="Class index by name, for folders in no such order.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, Option(min=1, metavar="N", help="At most this many images.", show_default=False)
    ] = None,
    num_calib: Annotated[int, Option(min=1, metavar="N", help="Of them, for passes that don't train.")] = 64,
    tensorboard: Annotated[
        Path | None,
        Option(metavar="DIR", help="Write the curves here, for TensorBoard, as they grow.", show_default=False),
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Train a model, and write an artifact with its curves: to compress, to run in torch, to take weights from.

    The same command goes on with a training that was stopped. For several processes or machines, put
    `accelerate launch` before it.
    """
    from martlet.data import open_images
    from martlet.training.job import train

    try:
        with working("load the model") as progress, _plotting(tensorboard) as scalars:
            artifact = train(
                lambda: model_options.load(model, seed),
                images=open_images(images, class_map=class_map, split=split, limit=limit, seed=seed),
                recipe=limited(recipe, epochs, minutes),
                out=out,
                teacher=teacher,
                num_calib=num_calib,
                overwrite=overwrite,
                seed=seed,
                progress=progress,
                scalars=scalars,
                command=ctx.obj,
            )
    except Stopped:
        folder = Kept.beside(out).folder
        if any(folder.glob("*.safetensors")):
            note(f"what was learned is kept in {folder}; the same command goes on from there")
        raise
    _tell(artifact, json)
    return 0


def limited(spec: str, epochs: float | None, minutes: float | None) -> Recipe:
    """The recipe with other limits for its passes that train, where any are given.

    Raises:
        RecipeError: as `Recipe.load`.
        UsageError: no pass trains.
    """
    from martlet.core.recipe import Recipe
    from martlet.training.technique import Training

    recipe = Recipe.load(spec)
    changes = {name: value for name, value in (("epochs", epochs), ("minutes", minutes)) if value is not None}
    if changes and not any(isinstance(technique, Training) for technique in recipe.passes):
        raise UsageError(f"--{next(iter(changes))} limits passes that train, and {recipe} has none")
    return Recipe(tuple(replace(t, **changes) if isinstance(t, Training) else t for t in recipe.passes))


@contextmanager
def _plotting(folder: Path | None) -> Iterator[Scalars]:
    """Raises:
    UsageError: TensorBoard isn't installed.
    """
    if folder is None:
        yield unplotted
        return
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs tensorboard: pip install 'martlet[tensorboard]'") from None
    with SummaryWriter(folder) as writer:
        yield lambda name, value, step: writer.add_scalar(name, value, step)


def _tell(artifact: Artifact, json: bool) -> None:
    import json as text

    document = text.loads((artifact.path / "training.json").read_text(encoding="utf-8"))
    if json:
        emit(document)
        return
    rows = []
    for its in document["passes"]:
        training = its["training"]
        rows.append((its["name"], f"{training['steps']} steps of {training['batch']} images, of {training['images']}"))
        if training["held_back"]:
            _, loss, top1_pct = training["held_back"][-1]
            right = "" if top1_pct is None else f", top-1 {top1_pct:.1f} %"
            rows.append(("held back", f"loss {loss:.4g}{right}"))
    show(facts(rows), "", f"Artifact  {artifact.path}", f"Page      {artifact.path / 'training.html'}")
