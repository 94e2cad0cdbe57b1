import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from martlet import engine as engines
from martlet.core import store
from martlet.core.errors import NumericsError, SourceError, UsageError
from martlet.data.preprocess import Preprocess
from martlet.source import load_model, load_other, rebuild

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = {"spec": "timm:vit_tiny_patch16_224", "model_kwargs": TINY, "num_classes": 5}

FACTORY = """
import dataclasses
from torch import nn
import beside

@dataclasses.dataclass
class Config:
    width: int = 4

def make(num_classes=3, width=4, scale=1.0):
    return nn.Sequential(nn.Conv2d(3, Config(width).width, 8, 8), nn.Flatten(), nn.LazyLinear(num_classes))

def classifier(num_classes=3):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(beside.CHANNELS, num_classes))

def broken():
    raise KeyError("no such layer")

def features():
    return nn.Conv2d(3, 4, 3)

def infinite():
    model = classifier()
    nn.init.constant_(model[2].bias, float("nan"))
    return model

NUMBER = 3
"""


@pytest.fixture
def factory(tmp_path) -> str:
    (tmp_path / "beside.py").write_text("CHANNELS = 3\n")
    (tmp_path / "net.py").write_text(FACTORY)
    return f"{tmp_path}/net.py"


def test_timm_is_seeded_and_leaves_the_global_seed_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    a, b, c = (load_model(**VIT, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert not a.module.training
    assert a.num_classes == 5
    assert a.origin["weights"] == "random (seed 0)"
    weights = [model.module.state_dict()["blocks.0.attn.qkv.weight"] for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_timm_states_its_preprocessing():
    half = (0.5, 0.5, 0.5)
    assert load_model(**VIT).preprocess == Preprocess(size=(32, 32), resize=35, mean=half, std=half)
    plain = load_model("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert plain.preprocess == Preprocess(size=(224, 224), resize=248, mean=half, std=half)
    assert plain.class_names is not None
    assert len(plain.class_names) == plain.num_classes == 1000
    squashed = load_model("timm:resnet18", preprocess={"size": [64, 64], "resize": [64, 64], "std": [1, 1, 1]})
    assert squashed.preprocess == Preprocess(size=(64, 64), resize=(64, 64), std=(1, 1, 1))


def test_tiny_vit_has_all_of_imagenet_unless_told():
    assert load_model("timm:tiny_vit_5m_224").num_classes == 21841
    assert load_model("timm:tiny_vit_5m_224", num_classes=10).num_classes == 10


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "mobilenet_v3_small"])
def test_torchvision_states_its_preprocessing(name):
    import torchvision

    kwargs = {"image_size": 32, "num_layers": 1} if name == "vit_b_16" else {}
    if kwargs:
        with pytest.raises(SourceError, match="multiple values"):
            load_model(f"torchvision:{name}", model_kwargs=kwargs)
        kwargs = {"image_size": 32}
    model = load_model(f"torchvision:{name}", model_kwargs=kwargs, num_classes=4)
    theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert model.num_classes == 4
    assert model.preprocess.size == ((32, 32) if kwargs else (theirs.crop_size[0],) * 2)
    assert model.preprocess.mean == tuple(theirs.mean)
    assert model.preprocess.interpolation == theirs.interpolation.value
    if not kwargs:
        assert model.preprocess.resize == theirs.resize_size[0]
    rebuild(json.loads(json.dumps(model.origin))).load_state_dict(model.module.state_dict())


def test_a_python_file_runs_only_when_trusted(factory, monkeypatch):
    monkeypatch.delitem(sys.modules, "martlet_source_net", raising=False)  # another test's file of that name
    spec = f"{factory}:classifier"
    with pytest.raises(UsageError, match="--trust-code"):
        load_model(spec, preprocess={"size": 16})
    assert "martlet_source_net" not in sys.modules
    with pytest.raises(SourceError, match="size, mean and std"):
        load_model(spec, trust_code=True)
    model = load_model(spec, trust_code=True, preprocess={"size": 16}, num_classes=7)
    assert model.num_classes == 7
    assert model.preprocess == Preprocess(size=(16, 16), resize=18)

    origin = json.loads(json.dumps(model.origin))
    rebuild(origin, trust_code=True).load_state_dict(model.module.state_dict())
    with pytest.raises(UsageError, match="--trust-code"):
        rebuild(origin)
    with open(factory, "a") as file:
        file.write("# changed\n")
    with pytest.raises(SourceError, match="isn't the file that the model was made from"):
        rebuild(origin, trust_code=True)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("clasifier", SourceError, "did you mean classifier"),
        ("NUMBER", SourceError, "no function 'NUMBER'"),
        ("broken", SourceError, "KeyError: 'no such layer'"),
        ("dict", SourceError, "no function 'dict'"),
        ("Config", SourceError, "returns a Config, not"),
        ("features", SourceError, r"gives \(1, 4, 14, 14\) for one image, not logits"),
        ("infinite", NumericsError, "NaN or infinity"),
    ],
)
def test_a_bad_factory_is_told(factory, name, error, message):
    with pytest.raises(error, match=message):
        load_model(f"{factory}:{name}", trust_code=True, preprocess={"size": 16})


def test_rebuild_gives_the_same_architecture():
    model = load_model(**VIT)
    again = rebuild(json.loads(json.dumps(model.origin)))
    assert not again.training
    again.load_state_dict(model.module.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model.module(x))
    with pytest.raises(SourceError, match="'keras'"):
        rebuild({"library": "keras"})


def test_the_zoo():
    from martlet import models

    small = {"img_size": [32, 40], "dims": [16, 32], "depths": [1, 2], "num_heads": [0, 2]}
    for name, kwargs in (("digit_vit", {}), ("fcaformer_l1", small)):
        model = load_model(f"martlet:{name}", weights="random", model_kwargs=kwargs)
        assert model.preprocess == models.preprocess(name, kwargs.get("img_size"))
        assert model.origin["weights"] == "random (seed 0)"
        rebuild(json.loads(json.dumps(model.origin))).load_state_dict(model.module.state_dict())
    assert model.preprocess.size == (32, 40)
    file = models.weights("digit_vit")
    assert load_model("martlet:digit_vit").origin["weights"].startswith(file.name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "vit_tiny_patch16_224"}, "did you mean timm:vit_tiny_patch16_224"),
        ({"spec": "nothing_of_the_kind"}, "forms: timm:NAME"),
        ({"spec": "tim:vit_tiny_patch16_224"}, "did you mean timm"),
        ({"spec": "timm:vit_tiny_patch16_225"}, "did you mean vit_tiny_patch16_224"),
        ({"spec": "timm:vit_tiny_patch16_224.augreg"}, "known: augreg_in21k, "),
        (
            {"spec": "timm:vovnet39a", "weights": "pretrained"},
            "timm can't get the pretrained weights of vovnet39a: No ",
        ),
        ({"spec": "martlet:stvit_r_swin_small_patch4_window7_224", "weights": "pretrained"}, "without trained weights"),
        ({"spec": "timm:"}, "names no model"),
        ({"spec": "timm:vit_small_patch14_dinov2"}, "no classifier.*--num-classes"),
        ({"spec": "torchvision:vit_b_17"}, "did you mean vit_b_16"),
        ({"spec": "martlet:digit_vitt"}, "the zoo has no model"),
        ({"spec": "net.py"}, "net.py:FACTORY"),
        ({"spec": "nowhere/net.py:make"}, "there is no file"),
        ({**VIT, "num_classes": 0}, "at least one class"),
        ({**VIT, "model_kwargs": {"norm_layer": torch.nn.LayerNorm}}, "must be JSON"),
        ({**VIT, "model_kwargs": {"dept": 2}}, "dept"),
        ({**VIT, "preprocess": {"size": 33}}, r"can't take images of 33 × 33 \(Input height"),
        ({**VIT, "preprocess": {"sizes": 33}}, "did you mean size"),
        ({**VIT, "model_kwargs": {**TINY, "in_chans": 1}}, "can't take images of 32 × 32"),
    ],
)
def test_a_bad_model_gets_one_clear_line(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_model(**options)
    assert "\n" not in str(caught.value)


def test_a_folder_is_an_artifact_or_a_hint(tmp_path):
    with pytest.raises(SourceError, match=r"no artifact\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=f"did you mean hf:{tmp_path}"):
        load_model(str(tmp_path))
    (tmp_path / "artifact.json").write_text("{}")
    with pytest.raises(UsageError, match="name it alone"):
        load_model(str(tmp_path), num_classes=3)


def test_another_model_has_the_weights_named_with_it(tmp_path):
    kwargs = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=kwargs, num_classes=3, seed=1)
    assert load_other(model, model) is model
    named = load_model("timm:test_vit", num_classes=3, seed=2)
    save_file(named.module.state_dict(), tmp_path / "other.safetensors")
    other = load_other(f"timm:test_vit={tmp_path / 'other.safetensors'}", model)
    x = torch.zeros(1, 3, *other.preprocess.size)
    assert other.num_classes == 3
    assert torch.equal(other.module(x), named.module(x))


def test_an_artifact_has_its_own_weights(tmp_path):
    model = load_model("timm:test_vit", num_classes=3, seed=2)
    engine = engines.get("torch")
    with store.writing(tmp_path / "made") as folder:
        store.seal(folder, model, engine.name, store.write_model(folder, model, engine))
    x = torch.zeros(1, 3, *model.preprocess.size)
    assert torch.equal(load_other(str(tmp_path / "made"), model).module(x), model.module(x))
    with pytest.raises(UsageError, match="is an artifact, with its own weights"):
        load_other(f"{tmp_path / 'made'}=other.safetensors", model)
