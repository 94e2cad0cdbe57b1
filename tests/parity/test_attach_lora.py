"""A LoRA beside rounded weights does what peft does with it beside whole ones, and rounds nothing anew."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from martlet.core import pipeline, registry
from martlet.core.errors import MartletError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.nn.quantizers import PackedWeightQuantizer
from martlet.source import load_model

peft = pytest.importorskip("peft")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "class_token": False}
LINEARS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


class Noise:
    num_images = 16

    def __iter__(self) -> Any:
        yield torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def model() -> Model:
    torch.manual_seed(0)
    preprocess = {"size": (32, 32), "resize": 32}
    kwargs = TINY | {"global_pool": "avg"}
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=kwargs, num_classes=5, seed=3, preprocess=preprocess)
    for parameter in found.module.requires_grad_(False).parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    for module in found.module.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.mul_(torch.rand(module.weight.shape) * 3 + 0.2)  # smoothing has to do something
    return found


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("lora"))


def written(folder: Path, **settings: Any) -> Path:
    """A LoRA of another rank in the MLPs, with values that matter, as peft writes it."""
    torch.manual_seed(1)
    its = {"r": 4, "lora_alpha": 6, "target_modules": LINEARS, "rank_pattern": {"mlp.fc1": 2}} | settings
    tuned = peft.get_peft_model(copy.deepcopy(model().module), peft.LoraConfig(**its))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    tuned.save_pretrained(folder)
    return folder


def merged(adapter: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model().module), adapter).merge_and_unload()


def run(start: Model, *passes: tuple[str, dict[str, Any]]) -> Model:
    recipe = Recipe(tuple(registry.technique(name)(**settings) for name, settings in passes))
    return pipeline.run(start, recipe, Context(images=Noise()))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.fixture(scope="module")
def plain() -> Model:
    """Of full rank, so that nothing is left to round of weights, and what is attached shows by itself."""
    return run(model(), ("svdquant", {"rank": 10**6, "weight_bits": 4, "activation_bits": 8}))


@torch.no_grad()
def test_it_does_what_peft_does_on_the_whole_model(plain: Model, adapter: Path) -> None:
    images = next(iter(Noise()))
    wanted, whole = merged(adapter)(images), model().module(images)
    attached = run(plain.copy(), ("attach_lora", {"adapter": str(adapter)}))
    assert error(wanted, whole) > 0.2
    found = error(wanted, attached.module(images))
    assert found < 0.05
    [step] = plain.steps  # inputs are smoothed, and without minding that the update is another
    unscaled = replace(plain.copy(), steps=[replace(step, record=step.record | {"ratios": {}})])
    wrong = run(unscaled, ("attach_lora", {"adapter": str(adapter)}))
    assert error(wanted, wrong.module(images)) > 2 * found


def test_what_was_rounded_stays_as_it_was_and_the_artifact_rebuilds(adapter: Path) -> None:
    start = run(model(), ("svdquant", {"rank": 5}))
    attached = run(start.copy(), ("attach_lora", {"adapter": str(adapter)}))
    before, after = (
        {n: m.codes for n, m in its.module.named_modules() if isinstance(m, PackedWeightQuantizer)}
        for its in (start, attached)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(codes, after[name]) for name, codes in before.items())
    ranks = attached.steps[-1].record["ranks"]
    assert sorted(ranks.values()) == sorted([5 + 4] * 9 + [5 + 2] * 3)
    rebuilt = run(model(), ("svdquant", {"rank": 5}))
    attached.steps[-1].technique.restore_(rebuilt, json.loads(json.dumps(attached.steps[-1].record)))
    rebuilt.module.load_state_dict(attached.module.state_dict())
    images = next(iter(Noise()))
    assert isinstance(rebuilt.module, GraphModule)
    assert torch.equal(rebuilt.module(images), attached.module(images))
    assert not torch.equal(start.module(images), attached.module(images))


def test_two_loras_add_up(plain: Model, adapter: Path) -> None:
    images = next(iter(Noise()))
    twice = run(plain.copy(), *[("attach_lora", {"adapter": str(adapter)})] * 2)
    double = merged(adapter).state_dict()
    base = model().module
    base.load_state_dict({n: 2 * double[n] - value for n, value in base.state_dict().items()})
    assert error(base(images), twice.module(images)) < 0.1  # activations leave the grids of the model without any
    assert error(base(images), merged(adapter)(images)) > 0.15


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json; peft's"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "can't be read"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "VERA"}'), "type VERA, not LORA"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "there is no weights file"),
    ],
)
def test_a_folder_without_a_lora_is_one_clear_error(plain: Model, tmp_path: Path, change: Any, text: str) -> None:
    folder = written(tmp_path / "lora")
    change(folder)
    with pytest.raises(MartletError, match=text):
        run(plain.copy(), ("attach_lora", {"adapter": str(folder)}))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, "has use_dora, which is more than two factors"),
        ({"modules_to_save": ["head"]}, "has modules_to_save, which"),
        ({"alpha_pattern": {"mlp.fc1": 3}}, "has alpha_pattern, which"),
    ],
)
def test_more_than_two_factors_is_refused(plain: Model, tmp_path: Path, settings: Any, text: str) -> None:
    with pytest.raises(MartletError, match=text):
        run(plain.copy(), ("attach_lora", {"adapter": str(written(tmp_path, **settings))}))


def test_what_does_not_fit_is_named(plain: Model, adapter: Path) -> None:
    with pytest.raises(MartletError, match=r"^attach_lora: adapter names no folder; give one that peft wrote"):
        run(plain.copy(), ("attach_lora", {}))
    with pytest.raises(MartletError, match=r"^attach_lora: nothing of .* is split yet; .*svdquant \| attach_lora"):
        run(model(), ("attach_lora", {"adapter": str(adapter)}))
    with pytest.raises(MartletError, match=r"^attach_lora: nothing of .* is split yet"):
        run(model(), ("svdquant", {"rank": 0}), ("attach_lora", {"adapter": str(adapter)}))
