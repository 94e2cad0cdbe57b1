"""`martlet eval`: how often a model or an artifact is right."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from martlet.cli.options import ENGINE_NAMES, ImageOptions, Json, ModelOptions, Seed, Spec, Threads
from martlet.cli.terminal import emit, facts, note, note_skipped, show, working

Engine = Annotated[
    str | None,
    Option(
        metavar="ENGINE",
        help=f"{ENGINE_NAMES}; if not given, an artifact's own, and openvino for a model.",
        show_default=False,
    ),
]


def evaluate(
    model: Spec,
    image_options: ImageOptions,
    model_options: ModelOptions,
    engine: Engine = None,
    threads: Threads = None,
    worst_case: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="Also make N images cost as much as they can, within 8/255 of a pixel; for what can stop early.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure top-1 and top-5 of a model or an artifact, run by an engine."""
    with working("load the model") as progress:
        from martlet.job import evaluate

        document = evaluate(
            model_options.open(model, seed),
            image_options.open(seed),
            engine=engine,
            threads=threads,
            worst_case=worst_case,
            trust_code=model_options.trust_code,
            progress=progress,
        )
    note_skipped(document["images"]["skipped"])
    if json:
        emit(document)
        return
    from martlet.report import units, verdict

    n = document["n_images"]
    rows = [
        ("Model", document["model"]),
        ("Engine", f"{verdict.title(document['engine']['name'])} {document['engine']['version']}"),
        ("Float precision", document["precision"]),
        *([("Simulated", "yes: the engine has no kernels for this arithmetic")] if document["simulated"] else []),
        ("Threads", str(document["threads"])),
        ("Images", f"{n:,} of {document['images']['source']}"),
        ("Top-1", units.percent(document["top1_pct"], n)),
        ("Top-5", units.percent(document["top5_pct"], n)),
        *(
            (
                f"Left after stage {k}",
                f"{units.number(stage['share_pct'])} % at {units.number(stage['gmacs'])} GMACs, "
                f"top-1 {units.percent(stage['top1_pct'], round(n * stage['share_pct'] / 100))}",
            )
            for k, stage in enumerate(document["exits"] or (), 1)
        ),
    ]
    if attacked := document.get("worst_case"):
        change = f"{units.number(attacked['mean_gmacs'])} → {units.number(attacked['attacked_mean_gmacs'])} GMACs"
        cap = f"{units.number(attacked['attacked_max_gmacs'])} of at most {units.number(attacked['max_gmacs'])} GMACs"
        rows += [("Made to cost more", f"mean {change}, {attacked['inflation']:.2f}×"), ("Dearest of them", cap)]
    show(facts(rows))
    if document["top1_pct"] is None:
        note("the images have no labels, so nobody knows how often the model is right")
