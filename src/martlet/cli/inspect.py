"""`martlet inspect`: what is in a model or an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from martlet.cli.options import ENGINE_NAMES, Json, ModelOptions, Seed, Spec
from martlet.cli.terminal import emit, facts, note, show, table, working
from martlet.core.errors import UsageError

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from martlet.core.model import Model
    from martlet.core.store import Artifact
    from martlet.core.technique import Progress
    from martlet.measure.efficiency import Efficiency
    from martlet.vit.view import VitView

NOISE_IMAGES = 4
"""What a recipe is tried on, since what it applies to doesn't depend on the images."""


def inspect(
    model: Spec,
    model_options: ModelOptions,
    recipe: Annotated[
        str | None,
        Option(metavar="RECIPE", help="Try it, on noise, and say what it applies to.", show_default=False),
    ] = None,
    engine: Annotated[
        str | None,
        Option(metavar="NAME", help=f"Time every layer on it, on this machine: {ENGINE_NAMES}.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        Option(metavar="FILE", help="Write a page with a picture of these times; on OpenVINO.", show_default=False),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show a model's layers, their work and the preprocessing; or an artifact's recipe, files and result."""
    if html and not html.absolute().parent.is_dir():
        raise UsageError(f"{html} can't be written: there is no folder {html.absolute().parent}")
    timed_on = engine or ("openvino" if html else None)
    if timed_on:
        from martlet import engine as engines

        engines.get(timed_on).version()
    with working("load the model") as progress:
        from martlet.core.store import Artifact

        opened = model_options.open(model, seed)
        if isinstance(opened, Artifact) and timed_on:
            raise UsageError(f"layers are timed of a model, not of an artifact; {model} has its times in report.html")
        if isinstance(opened, Artifact) and recipe is None:
            document = describe_artifact(opened)
        else:
            torch_model = opened.model(trust_code=model_options.trust_code) if isinstance(opened, Artifact) else opened
            document = describe_model(torch_model, recipe, seed, progress)
            if timed_on:
                from martlet.measure.efficiency import efficiency

                document["efficiency"] = efficiency(torch_model, timed_on, progress)
    if html:
        from martlet.report import efficiency as page

        page.write(document["model"], document["efficiency"], html)
    if json:
        emit(document)
    elif "files" in document:
        _show_artifact(document)
    else:
        _show_model(document)
    if html:
        note(f"wrote {html}")


def describe_artifact(artifact: Artifact) -> dict[str, Any]:
    """`artifact`, `model`, `recipe`, `engine`, `precision`, `simulated`, `preprocess`, `files` and `headline`."""
    from martlet.report import verdict

    saved = artifact.manifest
    return {
        "artifact": str(artifact.path),
        "model": saved["model"]["name"],
        "recipe": str(artifact.recipe),
        "engine": artifact.engine,
        "precision": artifact.precision,
        "simulated": saved["model"]["simulated"],
        "preprocess": artifact.preprocess.to_json(),
        "files": {name: file["bytes"] for name, file in saved["files"].items()},
        "gate": artifact.report["gate"],
        "headline": verdict.headline(artifact.report),
    }


def describe_model(model: Model, recipe: str | None, seed: int, progress: Progress) -> dict[str, Any]:
    """What is in a model, its `layers` with their work, and what the `recipe` does to it.

    `view` is the structure of a vision transformer; if it is None, `no_view` says why.

    Raises:
        MartletError: the model can't be traced, or the recipe doesn't fit it.
    """
    from martlet.core.errors import SourceError
    from martlet.measure import size
    from martlet.vit.view import view

    progress("trace the model", 0, 0)
    layers = describe_layers(_traced(model), model.preprocess.size)
    try:
        structure, doubt = describe_view(view(model.module)), None
    except SourceError as error:
        structure, doubt = None, str(error)
    return {
        "model": model.name,
        "weights": model.origin.get("weights"),
        "num_classes": model.num_classes,
        "preprocess": model.preprocess.to_json(),
        "params": size.params(model.module),
        "weight_bytes": size.weight_bytes(model.module),
        "gmacs": sum(layer["macs"] for layer in layers) / 1e9,
        "view": structure,
        "no_view": doubt,
        "layers": layers,
        "recipe": None if recipe is None else try_recipe(model, recipe, seed, progress),
    }


def describe_view(found: VitView) -> dict[str, Any]:
    """What a vision transformer is made of."""
    tokens = found.tokens
    return {
        "library": found.library,
        "family": found.family,
        "blocks": len(found.blocks),
        "embed_dim": found.embed_dim,
        "num_heads": sorted({block.attention.num_heads for block in found.blocks}),
        "head_dim": sorted({block.attention.head_dim for block in found.blocks}),
        "grid": None if tokens.grid is None else list(tokens.grid),
        "prefix_tokens": tokens.num_prefix,
        "heads": len(found.heads),
    }


def describe_layers(traced: GraphModule, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Every multiplication in order: `name`, `kind`, `weight_shape`, `output_shape` for one image, `params`, `macs`."""
    from martlet.graph.sites import parameter_name, sites
    from martlet.graph.trace import example_values
    from martlet.measure.macs import macs_by_node

    shapes = example_values(traced, size)
    macs = macs_by_node(traced, shapes)
    layers = []
    for site in sites(traced):
        owned = [shapes[node] for node in site.node.all_input_nodes if parameter_name(node)]  # weight, then bias
        layers.append(
            {
                "name": site.name,
                "kind": site.kind,
                "weight_shape": list(owned[0]) if owned else None,
                "output_shape": list(shapes[site.node]),
                "params": sum(shape.numel() for shape in owned),
                "macs": macs[site.node].macs if site.node in macs else 0,
            }
        )
    return layers


def try_recipe(model: Model, recipe: str, seed: int, progress: Progress) -> dict[str, Any]:
    """Runs the recipe over a copy, on noise: what each technique did, and in how many bits every kind of tensor is.

    Raises:
        RecipeError: no such recipe, or it can't work on this model.
    """
    import numpy as np

    from martlet.core import pipeline
    from martlet.core.recipe import Recipe
    from martlet.core.technique import Context
    from martlet.data import open_images
    from martlet.data.calibration import Calibration
    from martlet.graph.bits import bit_map
    from martlet.proof import describe_recipe

    loaded = Recipe.load(recipe)
    noise = np.random.default_rng(seed).integers(0, 256, (NOISE_IMAGES, *model.preprocess.size, 3), dtype=np.uint8)
    images = Calibration(open_images(list(noise)), model.preprocess, n=NOISE_IMAGES, seed=seed)
    compressed = pipeline.run(model, loaded, Context(images=images, seed=seed, progress=progress))
    return {**describe_recipe(compressed), "bits": bit_map(_traced(compressed), compressed.precision)}


def _traced(model: Model) -> GraphModule:
    from torch.fx import GraphModule

    from martlet.graph.trace import trace

    return model.module if isinstance(model.module, GraphModule) else trace(model.module, model.preprocess.size)


def _show_artifact(document: dict[str, Any]) -> None:
    from martlet.report import units, verdict

    keys = ("artifact", "model", "recipe")
    rows = [(key.capitalize(), document[key]) for key in keys]
    rows.append(("Engine", f"{verdict.title(document['engine'])}, floating point in {document['precision']}"))
    if document["simulated"]:
        rows.append(("Simulated", "yes"))
    rows += [("Preprocessing", _preprocess(document)), ("Result", document["headline"])]
    rows += [(name, units.size(size)) for name, size in document["files"].items()]
    show(facts(rows))


def _show_model(document: dict[str, Any]) -> None:
    from martlet.report import units

    rows = [
        [
            layer["name"],
            layer["kind"],
            _shape(layer["weight_shape"]),
            _shape(layer["output_shape"][1:]),
            units.count(layer["macs"]),
            units.count(layer["params"]),
        ]
        for layer in document["layers"]
    ]
    headings = ("Layer", "Kind", "Weight", "Output", "MACs", "Parameters")
    show(
        table(headings, rows, numbers=headings[2:]),
        f"{document['model']}: {units.count(document['params'])} parameters, {units.size(document['weight_bytes'])}, "
        f"{units.quantity(document['gmacs'], 'GMACs')}, {document['num_classes']:,} classes; "
        f"weights {document['weights']}",
        _preprocess(document),
        _view(document),
    )
    if timed := document.get("efficiency"):
        _show_efficiency(timed)
    if tried := document["recipe"]:
        steps = [(step["name"], step["summary"], _record(step["record"])) for step in tried["steps"]]
        bits = sorted(tried["bits"].items())
        show(table(("Technique", "What it does", "Here"), steps), table(("Tensors", "Bits"), bits))


def _show_efficiency(found: Efficiency) -> None:
    from martlet.report import units

    rows = [
        [
            layer["name"],
            layer["kind"],
            units.number(layer["microseconds"]),
            units.size(layer["bytes"]),
            units.percent(layer["efficiency_pct"]),
            units.percent(layer["attainable_pct"]),
        ]
        for layer in found["layers"]
    ]
    headings = ("Layer", "Kind", "µs", "Bytes", "Of the peak", "Memory allows")
    show(
        table(headings, rows, numbers=headings[2:]),
        f"{found['engine']} in float32, one image, {found['threads']} thread(s): "
        f"{units.quantity(found['latency_ms'], 'ms')}, {units.percent(found['efficiency_pct'])} of the peak of "
        f"{units.quantity(found['peak_gmacs_per_s'], 'GMAC/s')} that a dense product reaches. "
        f"Operations together: {units.quantity(found['operations_ms'], 'ms')}, of which "
        f"{units.quantity(found['other_microseconds'] / 1e3, 'ms')} multiply nothing. "
        f"Under {units.number(found['waterline_macs_per_byte'])} MACs a byte, a layer waits for memory.",
    )


def _shape(shape: list[int] | None) -> str:
    return "–" if shape is None else "×".join(map(str, shape))


def _preprocess(document: dict[str, Any]) -> str:
    p = document["preprocess"]
    resize = "no resize" if p["resize"] is None else f"resize {p['resize']} ({p['fit']}, {p['interpolation']})"
    mean, std = (", ".join(f"{v:.4g}" for v in p[key]) for key in ("mean", "std"))
    return f"Images: {resize}, crop {_shape(p['size'])}, mean {mean}, std {std}"


def _view(document: dict[str, Any]) -> str:
    v = document["view"]
    if v is None:
        return f"View: {document['no_view']}"
    heads, dims = ("/".join(map(str, v[key])) for key in ("num_heads", "head_dim"))
    grid = "any grid" if v["grid"] is None else f"{_shape(v['grid'])} patches"
    prefix = f"{v['prefix_tokens']} prefix token{'' if v['prefix_tokens'] == 1 else 's'}"
    return (
        f"View: {v['family']} of {v['library']}, {v['blocks']} blocks, {heads} heads of {dims}, dimension "
        f"{v['embed_dim']}, {grid} and {prefix}"
    )


def _record(record: dict[str, Any]) -> str:
    """What a technique says of what it did: its counts."""
    counts = {key: value for key, value in record.items() if isinstance(value, int | str)}
    for key, value in record.items():
        if isinstance(value, dict) and value and all(isinstance(v, int | str) for v in value.values()):
            counts[key] = ", ".join(f"{v} {k}" for k, v in value.items())
    return "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in counts.items())
