import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from martlet.core.errors import SourceError
from martlet.data.preprocess import Preprocess
from martlet.source import load_model, rebuild

transformers = pytest.importorskip("transformers")

PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VIT = {**PLAIN, "intermediate_size": 64}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
SQUARE = {"height": 32, "width": 32}
EDGE = {"shortest_edge": 40}
MODELS = {
    "ViT": (VIT, "ViTImageProcessor", {"size": SQUARE}),
    "DeiT": (VIT, "DeiTImageProcessor", {"size": {"height": 36, "width": 36}, "crop_size": SQUARE}),
    "Dinov2": (PLAIN, "BitImageProcessor", {"size": EDGE, "crop_size": SQUARE}),
    "Swin": (SWIN, "ViTImageProcessor", {"size": SQUARE, "image_mean": [0.4, 0.5, 0.6], "rescale_factor": 1 / 127.5}),
    "ConvNext": (
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "image_size": 64},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 64}},
    ),
}


def save(folder, kind: str = "ViT", processor: str | None = None, **settings) -> tuple[str, torch.nn.Module]:
    shape, usual, usual_settings = MODELS[kind]
    config = getattr(transformers, f"{kind}Config")(num_labels=3, id2label={0: "ant", 1: "bee", 2: "cat"}, **shape)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    model.save_pretrained(folder)
    getattr(transformers, processor or usual)(**(settings or usual_settings)).save_pretrained(folder)
    return f"hf:{folder}", model


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_folder_loads_exports_and_rebuilds(tmp_path, kind):
    spec, theirs = save(tmp_path, kind)
    model = load_model(spec)
    assert model.num_classes == 3
    assert model.class_names == ("ant", "bee", "cat")
    x = torch.randn(3, 3, *model.preprocess.size)
    with torch.no_grad():
        logits = theirs(pixel_values=x).logits
        assert torch.equal(model.module(x), logits)
        program = torch.export.export(model.module, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},))
        torch.testing.assert_close(program.module()(x[:1]), logits[:1])
    attention = [node for node in program.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert bool(attention) == (kind != "ConvNext")

    origin = json.loads(json.dumps(model.origin))
    for file in tmp_path.iterdir():
        file.unlink()
    again = rebuild(origin)
    again.load_state_dict(model.module.state_dict())
    assert torch.equal(again(x), model.module(x))


@pytest.mark.parametrize("kind", MODELS)
def test_preprocessing_is_the_image_processor_s(tmp_path, kind):
    spec, _ = save(tmp_path, kind)
    ours = load_model(spec).preprocess
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    y, x = np.mgrid[0:90, 0:70] / 90
    image = Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8))
    theirs = processor(images=image, return_tensors="np")["pixel_values"][0]
    assert theirs.shape == ours(image).shape
    assert np.abs((ours(image) - theirs) * np.reshape(ours.std, (3, 1, 1))).max() < 4 / 255 + 1 / 32


def test_preprocessing_that_is_more_is_not_guessed(tmp_path):
    spec, _ = save(tmp_path, processor="LevitImageProcessor", size={"shortest_edge": 32}, crop_size=SQUARE)
    with pytest.raises(SourceError, match="LevitImageProcessor does more than"):
        load_model(spec)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match=r"no image processor.*size, mean and std"):
        load_model(spec)
    half = (0.5, 0.5, 0.5)
    assert load_model(spec, preprocess={"std": half}).preprocess == Preprocess(
        size=(32, 32), resize=(32, 32), mean=half, std=half
    )


def test_weights_of_a_file_go_through_transformers_own_names(tmp_path):
    spec, theirs = save(tmp_path)
    random = load_model(spec, weights="random", seed=3)
    assert random.origin["weights"] == "random (seed 3)"
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(random.module(x), theirs(x).logits)
        assert torch.equal(load_model(spec, weights=tmp_path / "model.safetensors").module(x), theirs(x).logits)


def test_pickled_weights_are_not_read_unasked(tmp_path):
    spec, theirs = save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"--weights .*pytorch_model.bin"):
        load_model(spec)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_model(spec, weights=tmp_path / "pytorch_model.bin").module(x), theirs(x).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 7}, r"classifier.weight \(3, 32\) where the model has \(7, 32\).*--num-classes 3"),
        ({"preprocess": {"size": 33}}, "can't take images of 33 × 33"),
        ({"model_kwargs": {"depth": 3}}, "takes no depth"),
        ({"model_kwargs": {"num_hidden_layers": 3}}, r"16 missing \(vit"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, options, message):
    spec, _ = save(tmp_path)
    with pytest.raises(SourceError, match=message) as caught:
        load_model(spec, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_is_told(tmp_path):
    (tmp_path / "vit-base").mkdir()
    with pytest.raises(SourceError, match=r"did you mean vit-base\?"):
        load_model(f"hf:{tmp_path}/vit-bsae")
    with pytest.raises(SourceError, match=r"no config\.json"):
        load_model(f"hf:{tmp_path}/vit-base")


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "martlet.source.hf", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SourceError, match=r"pip install 'martlet\[hf\]'"):
        load_model("hf:somewhere")
