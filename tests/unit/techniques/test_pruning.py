"""Pruned models as artifacts: MACs, reloading in a process of their own, and what may follow."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from martlet import engine as engines
from martlet.core import pipeline, store
from martlet.core.errors import RecipeError, SourceError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.engine.torch import Torch
from martlet.measure.macs import macs
from martlet.source import load_model
from martlet.techniques.prune.magnitude import Magnitude
from martlet.techniques.quantize.int8 import Int8
from martlet.techniques.tokens.tome import ToMe
from martlet.vit import view
from martlet.vit.structure import shape_of

TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
CONVOLUTIONS = {"embed_dim": [16, 16, 16, 16], "depth": [1, 1, 1, 1]}
SMALL = {"size": (56, 56), "resize": (56, 56)}
PLAIN = Int8(ranges="minmax", shift=False, smooth=False, split=False, bias_correction=False)
"""Quick: what is asked doesn't depend on how ranges are found."""
SWIN = {"img_size": 56, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2)}


class Noise:
    num_images = 8

    def __init__(self, side: int) -> None:
        self.side = side

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(4, 3, self.side, self.side, generator=generator)


def vit(**kwargs: object) -> Model:
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY | kwargs, num_classes=10, seed=3)


def swin() -> Model:
    return load_model("timm:swin_tiny_patch4_window7_224", model_kwargs=SWIN, num_classes=10, seed=3, preprocess=SMALL)


def run(model: Model, *techniques: object) -> Model:
    context = Context(images=Noise(model.preprocess.size[0]), int8=engines.get("openvino").int8)
    return pipeline.run(model, Recipe(techniques), context)  # type: ignore[arg-type]


def images(model: Model) -> torch.Tensor:
    return torch.randn(2, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(("make", "prune_ratio"), [(vit, 0.45), (swin, 0.2)])
def test_as_many_macs_go_as_were_asked_for_and_hardly_more(make, prune_ratio: float) -> None:
    model = make()
    removed = 1 - macs(run(model, Magnitude(prune_ratio=prune_ratio, multiple=8))) / macs(model)
    assert prune_ratio <= removed < prune_ratio + 0.05


def test_sizes_are_multiples() -> None:
    found = {}
    for multiple in (4, 16):
        pruned = run(vit(), Magnitude(prune_ratio=0.3, multiple=multiple, repair=False))
        shapes = [shape_of(block) for block in view(pruned.module).blocks]
        found[multiple] = {size for shape in shapes for size in (shape.qk_dim, shape.v_dim, shape.hidden)}
        assert all(size % multiple == 0 for size in found[multiple])
    assert any(size % 16 for size in found[4])


def test_nothing_removed_is_the_original_to_the_bit() -> None:
    model = vit()
    pruned = run(model, Magnitude(prune_ratio=0.0))
    assert torch.equal(pruned.module(images(model)), model.module(images(model)))
    assert pruned.steps[0].record == {"blocks": [], "removed": [], "width": None}


RELOAD = """
import sys, torch, martlet.source
model = martlet.source.load_model(sys.argv[1])
images = torch.randn(2, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(9))
with torch.no_grad():
    torch.save(model.module(images), sys.argv[2])
"""


def test_an_artifact_reloads_in_a_process_of_its_own_and_is_pruned_again(tmp_path: Path) -> None:
    pruned = run(vit(), Magnitude(prune_ratio=0.3, multiple=8))
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, pruned, "torch", store.write_model(folder, pruned, Torch()))
    call = [sys.executable, "-c", RELOAD, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    subprocess.run(call, check=True)
    with torch.no_grad():
        expected = pruned.module(images(pruned))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, rtol=1e-4, atol=1e-6)
    again = run(load_model(str(tmp_path / "out")), Magnitude(prune_ratio=0.3, multiple=8))
    assert macs(again) <= 0.7 * macs(pruned)
    with store.writing(tmp_path / "twice") as folder:
        store.seal(folder, again, "torch", store.write_model(folder, again, Torch()))
    twice = load_model(str(tmp_path / "twice"))
    assert torch.equal(twice.module(images(twice)), again.module(images(again)))


def test_a_model_without_biases_stays_one_where_the_library_has_its_place(tmp_path: Path) -> None:
    pruned = run(vit(proj_bias=False), Magnitude(prune_ratio=0.3))
    assert view(pruned.module).blocks[0].mlp.fc2.bias is None
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, pruned, "torch", store.write_model(folder, pruned, Torch()))
    again = load_model(str(tmp_path / "out"))
    assert torch.equal(again.module(images(again)), pruned.module(images(pruned)))


def operations(model: Model, folder: Path) -> list[tuple[str, str]]:
    """What OpenVINO runs, and in which precision: attention's products are subgraphs, and Linears what they are."""
    import openvino as ov

    engines.get("openvino").lower(model, folder)
    compiled = ov.Core().compile_model(str(folder / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    info = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    named = [(each["layerType"].astype(str), each["runtimePrecision"].astype(str)) for each in info]
    return sorted(each for each in named if each[0] in ("Subgraph", "FullyConnected", "MatMul"))


@pytest.mark.parametrize("make", [vit, pytest.param(swin, marks=pytest.mark.slow)])
def test_int8_after_pruning_is_int8_in_attention_too(make, tmp_path: Path) -> None:
    model, folders = make(), [tmp_path / "whole", tmp_path / "pruned"]
    for folder in folders:
        folder.mkdir()
    whole = operations(run(model, PLAIN), folders[0])
    both = run(model, Magnitude(prune_ratio=0.4), PLAIN)
    assert operations(both, folders[1]) == whole
    blocks = len(view(model.module).blocks)
    assert whole.count(("Subgraph", "i8")) == blocks
    assert [precision for name, precision in whole if name == "FullyConnected"].count("u8") >= 4 * blocks


@pytest.mark.parametrize("engine", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_engines_give_what_torch_gives(engine: str, tmp_path: Path) -> None:
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
    pruned = run(vit(), Magnitude(prune_ratio=0.4), ToMe(r={0: 5}))
    with torch.no_grad():
        expected = pruned.module(images(pruned)).numpy()
    chosen = engines.get(engine)
    chosen.lower(pruned, tmp_path)
    found = chosen.open(tmp_path, batch=2, precision="f32", threads=1)(images(pruned).numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_ratio": 1.0}, "magnitude: prune_ratio is the share of MACs to remove"),
        ({"prune_ratio": -0.1}, "magnitude: prune_ratio is the share of MACs to remove"),
        ({"groups": ("hiden",)}, "magnitude: there is no group 'hiden'; did you mean hidden"),
        ({"groups": ()}, "magnitude: groups names nothing to cut"),
        ({"multiple": 0}, "magnitude: multiple is at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Magnitude(**settings)  # type: ignore[arg-type]


def test_a_ratio_that_empties_layers_is_refused_by_name() -> None:
    with pytest.raises(
        RecipeError, match=r"0\.95 would empty layers .* of blocks\.0; at most \d\d% .* from qk, v, hidden with"
    ):
        run(vit(), Magnitude(prune_ratio=0.95))


def test_a_group_that_is_asked_for_and_cant_be_cut_is_refused_by_name() -> None:
    normed = vit(qk_norm=True)
    with pytest.raises(RecipeError, match=r"magnitude can't cut dimensions of q and k at blocks\.0\.attn"):
        run(normed, Magnitude(groups=("qk", "hidden")))
    shapes = [shape_of(block) for block in view(run(normed, Magnitude(prune_ratio=0.3, multiple=8)).module).blocks]
    assert {shape.qk_dim for shape in shapes} == {16}
    assert all(shape.v_dim < 16 for shape in shapes)


def test_models_without_tokens_or_without_all_of_them_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"requires 'all_tokens', which passes\[0\] tome breaks; move magn"):
        run(vit(), ToMe(r=2), Magnitude())
    with pytest.raises(SourceError, match="no vision transformer"):
        run(load_model("timm:repvit_m0_9", model_kwargs=CONVOLUTIONS, num_classes=10, preprocess=SMALL), Magnitude())
