"""rsq: rotations that leave the logits, and GPTQ's Hessian of tokens scaled by attention, as in arXiv 2503.01820."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MODELS, Smooth, error, images, logits, model
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data import open_images
from martlet.data.calibration import Calibration
from martlet.functional.quantize.formats import IntegerGrid
from martlet.functional.quantize.gptq import effective_rows, gptq
from martlet.graph.attention import attentions
from martlet.graph.observe import OneBatch
from martlet.graph.sequential import linears
from martlet.nn.quantizers import PackedWeightQuantizer
from martlet.source import load_model
from martlet.techniques.quantize.gptq import GPTQ
from martlet.techniques.quantize.rsq import RSQ

ROTATED = {
    "class token": {"norms": 3, "values": 1},
    "no class token, odd depth": {"norms": 7, "values": 3},
    "registers and qk-norm": {"norms": 3, "values": 1},
    "no biases": {"norms": 0, "values": 1},
    "swin": {"norms": 3, "values": 3},
}


def run(original: Model, technique: GPTQ | RSQ) -> Model:
    return pipeline.run(original, Recipe((technique,)), Context(images=Smooth(), seed=1))


def prepare(kind: str) -> Model:
    rotated = model(kind)
    assert isinstance(rotated.module, GraphModule)
    assert RSQ().prepare_(rotated.module, Context(seed=1))["rotated"] == ROTATED[kind]
    return rotated


def quantizers(compressed: Model) -> dict[str, PackedWeightQuantizer]:
    named = compressed.module.named_modules()
    return {n.removesuffix(".weight_quantizer"): m for n, m in named if isinstance(m, PackedWeightQuantizer)}


@pytest.mark.parametrize("kind", MODELS)
def test_rotation_keeps_logits_to_1e_4(kind: str) -> None:
    original, rotated = model(kind), prepare(kind)
    assert error(logits(original.module, images()), logits(rotated.module, images())) < 1e-4
    weights = [dict(m.module.named_parameters()) for m in (original, rotated)]
    moved = [n for n, w in weights[0].items() if not torch.allclose(w, weights[1][n], atol=1e-3)]
    assert len(moved) >= 2 * sum(ROTATED[kind].values())


def test_equal_tokens_are_gptq_on_the_rotated_model() -> None:
    kind = "class token"
    settings = {"bits": 3, "damping": 0.02}
    equal = quantizers(run(model(kind), RSQ(tokens="equal", **settings)))
    rotated = quantizers(run(prepare(kind), GPTQ(**settings)))
    attention = quantizers(run(model(kind), RSQ(**settings)))
    assert equal.keys() == rotated.keys() == attention.keys()
    for name, quantizer in equal.items():
        assert all(torch.equal(a, b) for a, b in zip(quantizer.buffers(), rotated[name].buffers(), strict=True)), name
    assert any(not torch.equal(equal[n].integers()[0], attention[n].integers()[0]) for n in equal)  # it can fail
    plain = quantizers(run(model(kind), GPTQ(**settings)))
    assert any(not torch.equal(equal[n].integers()[0], plain[n].integers()[0]) for n in equal)


def tensors(graph_module: GraphModule, x: Tensor) -> dict[str, Tensor]:
    """What every node gives, by its name."""
    seen: dict[str, Tensor] = {}

    class Keep(Interpreter):
        def run_node(self, n):
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    with torch.no_grad():
        Keep(graph_module).run(x)
    return seen


def oracle(attention: list, least: float = 0.01) -> list[list[float]]:
    """r of each token: what all heads and queries give it, from the least to 1 in each image."""
    r = []
    for image in attention:
        received = [sum(head[i][j] for head in image for i in range(len(head))) for j in range(len(image[0]))]
        low, high = min(received), max(received)
        r.append([least + (1 - least) * (value - low) / (high - low) for value in received])
    return r


def test_hessians_are_those_of_scaled_tokens() -> None:
    """H = Σ (r x)(r x)ᵀ of the rotated model's tokens, for the first Linear, whose inputs no rounding has changed."""
    rotated = prepare("class token")
    assert isinstance(rotated.module, GraphModule)
    [attention], first = attentions(rotated.module), linears(rotated.module)[0]
    calibration = torch.cat(list(Smooth()))
    seen = tensors(rotated.module, calibration)
    r = torch.tensor(oracle(seen[attention.softmax.name].double().tolist()), dtype=torch.float64)
    x = seen[first.node.args[0].name].double()  # type: ignore[union-attr]
    weight = dict(rotated.module.named_parameters())["blocks.0.attn.qkv.weight"]
    codes = {}
    for name, scale in {"attention": r, "equal": torch.ones_like(r)}.items():
        scaled = (x * scale[..., None]).flatten(0, 1)
        hessian = sum(torch.outer(row, row) for row in scaled)
        assert isinstance(hessian, Tensor)
        damping = 0.3 * x.shape[-1] / effective_rows(scaled, scale.flatten().square())
        codes[name] = gptq(weight, hessian, IntegerGrid(3, symmetric=False), 24, max(damping, 0.01)).codes.int() - 4
    found = quantizers(run(model("class token"), RSQ(bits=3)))["blocks.0.attn.qkv"].integers()[0]
    assert (found == codes["attention"]).float().mean() > 0.999  # sums of another order may differ in a last bit
    assert (found == codes["equal"]).float().mean() < 0.99


def test_what_is_outside_an_attentions_block_counts_alike() -> None:
    done = run(model("class token"), RSQ())
    assert done.steps[0].record["weighted"] == 4  # all but the head
    done = run(model("swin"), RSQ())
    assert done.steps[0].record["weighted"] == 2 * 2 + 4  # an MLP doesn't see windows; all of the last block is one


def test_settings_and_recipe() -> None:
    with pytest.raises(RecipeError, match="rsq: tokens is 'norm'; it can be attention, equal"):
        RSQ(tokens="norm")
    with pytest.raises(RecipeError, match="rsq: bits is 1; it can be 2 to 8"):
        RSQ(bits=1)
    assert [technique.name for technique in Recipe.load("rsq").passes] == ["fuse", "rsq", "bf16"]
    assert Recipe.load("rsq").passes[1] == RSQ(bits=3)


@pytest.mark.slow
def test_the_class_token_errs_less_on_images_that_were_not_seen(assets: Path) -> None:
    """By the logits, which a real model's head makes of that token alone; 3 bits."""
    original = load_model(
        "timm:vit_tiny_patch16_224", weights=assets / "weights" / "vit_tiny_patch16_224.in1k.safetensors"
    )
    pool, sample = (
        open_images(assets / "data" / name / "test.parquet") for name in ("imagenet1k-val-227px", "imagenet1k-sample")
    )
    calibration = torch.cat(list(Calibration(pool, original.preprocess, n=128, batch_size=16, seed=0)))[::4][:24]
    others = [original.preprocess(image.image) for image in sample.sample(500, 0)]
    x = torch.from_numpy(np.stack(others[:100]))
    errors = {}
    for tokens in ("attention", "equal"):
        context = Context(images=OneBatch(calibration))
        done = pipeline.run(original, Recipe((RSQ(bits=3, tokens=tokens),)), context)
        errors[tokens] = error(logits(original.module, x), logits(done.module, x))
    assert errors["attention"] < errors["equal"]
