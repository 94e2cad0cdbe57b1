"""Reduced tokens in whole models of every library: what is untouched, what is refused, and what every block gets."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from martlet.core import pipeline
from martlet.core.errors import NumericsError, RecipeError, SourceError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.preprocess import Preprocess
from martlet.graph.trace import trace
from martlet.techniques.tokens.evit import EViT
from martlet.techniques.tokens.readout import Readout
from martlet.techniques.tokens.tome import ToMe
from martlet.techniques.tokens.tps import TPS
from martlet.techniques.tokens.turbo import Turbo
from martlet.vit import view
from martlet.vit.tokens import TokenReduction

SIZE = (40, 24)
"""Patches 5 by 3: odd in number."""
TIMM = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 3, "num_classes": 7}


def timm_vit(**kwargs: object) -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(**(TIMM | kwargs))  # type: ignore[attr-defined]


def hf(name: str, **kwargs: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 40}
    config = getattr(transformers, f"{name}Config")(
        **(sizes | {"image_size": 40, "patch_size": 8, "num_labels": 7}), **kwargs
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = getattr(transformers, f"{name}ForImageClassification")(config)

        def forward(self, images: Tensor) -> Tensor:
            return self.model(pixel_values=images).logits

    return Logits()


MODELS = {
    "class token": lambda: timm_vit(),
    "no class token": lambda: timm_vit(class_token=False, global_pool="avg"),
    "class token, mean of patches": lambda: timm_vit(global_pool="avg"),
    "registers and qk-norm": lambda: timm_vit(reg_tokens=4, qk_norm=True, init_values=0.1),
    "post-norm": lambda: timm_vit(block_fn=timm.models.vision_transformer.ResPostBlock),  # type: ignore[attr-defined]
    "scaled norms": lambda: timm_vit(scale_attn_norm=True, scale_mlp_norm=True),
    "hf vit": lambda: hf("ViT"),
    "hf dinov2 with registers": lambda: hf("Dinov2WithRegisters", num_register_tokens=2),
    "hf deit": lambda: hf("DeiT"),
    "torchvision": lambda: TorchvisionViT(40, 8, 5, 3, 24, 40, num_classes=7),
}


def build(name: str) -> Model:
    torch.manual_seed(1)
    module = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    size = SIZE if isinstance(module, timm.models.vision_transformer.VisionTransformer) else (40, 40)  # type: ignore[attr-defined]
    return Model(name=name, module=module, preprocess=Preprocess(size=size), num_classes=7, origin={})


def logits(model: Model, batch: int = 3) -> Tensor:
    images = torch.randn(batch, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.module(images)


def apply(model: Model, technique: TokenReduction | Readout) -> Model:
    return pipeline.run(model, Recipe((technique,)), Context())


def tokens_of(model: Model) -> list[int]:
    """How many tokens each block's MLP gets."""
    seen: list[int] = []
    handles = [
        block.mlp.module.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
        for block in view(model.module).blocks
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("technique", [ToMe(r=0), ToMe(r={2: 0}), ToMe(r={}), TPS(r=0), Turbo(r=0, alpha=0.0)])
def test_nothing_removed_is_the_untouched_model_to_the_bit(name: str, technique: TokenReduction) -> None:
    model = build(name)
    assert torch.equal(logits(apply(model, technique)), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_the_last_block_computes_what_is_read(name: str) -> None:
    model = build(name)
    done = apply(model, Readout())
    assert relative_error(logits(done), logits(model)) < 1e-5
    all_tokens = tokens_of(model)
    reads_all = name in ("no class token", "class token, mean of patches", "hf dinov2 with registers")
    assert tokens_of(done) == (all_tokens if reads_all else [*all_tokens[:-1], 1])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "technique",
    [
        ToMe(r={1: 3, 3: 2}),
        ToMe(r={1: 3, 3: 2}, partition="2x2"),
        ToMe(r={0: 7}),
        TPS(r={1: 3, 3: 2}, informativeness=0.0),
    ],
)
def test_later_blocks_get_fewer_tokens(name: str, technique: ToMe | TPS) -> None:
    model = build(name)
    expected = tokens_of(model)
    done = apply(model, technique)
    for block, r in technique.r:
        expected[block:] = [n - r for n in expected[block:]]
    found = tokens_of(done)
    assert found[:-1] == expected[:-1]
    assert found[-1] in (1, expected[-1])
    assert relative_error(logits(done), logits(model)) > 1e-4


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["class token", "no class token", "registers and qk-norm", "hf vit", "torchvision"])
@pytest.mark.parametrize("technique", [ToMe(r={1: 3, 3: 2}, partition="2x2"), TPS(r={1: 3, 3: 2})])
def test_the_trace_for_any_batch_agrees(name: str, technique: ToMe | TPS) -> None:
    done = apply(build(name), replace(technique, informativeness=0.0 if name == "no class token" else 0.3))
    graph = trace(done.module, done.preprocess.size)
    for batch in (1, 3):
        images = torch.randn(batch, 3, *done.preprocess.size)
        with torch.no_grad():
            torch.testing.assert_close(graph(images), done.module(images), rtol=1e-3, atol=1e-4)


def test_equal_patches_merge_without_a_trace() -> None:
    """Proportional attention: of images whose patches are all alike, a merged model gives the same logits."""
    for name in ("class token", "registers and qk-norm", "torchvision", "class token, mean of patches"):
        model = build(name)
        with torch.no_grad():
            for key, parameter in model.module.named_parameters():
                if "pos_embed" in key:
                    parameter.zero_()
        images = torch.ones(2, 3, *model.preprocess.size)
        with torch.no_grad():
            expected = model.module(images)
            done = apply(model, ToMe(r={1: 5, 2: 2}))
            torch.testing.assert_close(done.module(images), expected, rtol=1e-3, atol=1e-3)
            unequal = apply(model, ToMe(r={1: 5, 2: 2}))
            run = view(unequal.module).blocks[1].module.forward
            object.__setattr__(run, "proportional", False)
            if name != "class token, mean of patches":
                assert relative_error(unequal.module(images), expected) > 1e-3  # without it, they differ


def test_a_copy_is_reduced_by_itself() -> None:
    """The run's blocks are the copy's own."""
    done = apply(build("class token"), ToMe(r={1: 3}))
    twin = done.copy()
    expected = logits(done)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.zero_()
    assert torch.equal(logits(done), expected)
    assert not torch.equal(logits(twin), expected)


def test_names_parameters_and_view_stay() -> None:
    model = build("hf vit")
    done = apply(model, ToMe(r={1: 3}))
    assert done.module.state_dict().keys() == model.module.state_dict().keys()
    assert [b.name for b in view(done.module).blocks] == [b.name for b in view(model.module).blocks]
    names = [str(n.meta["nn_module_stack"]) for n in trace(done.module, (40, 40)).graph.nodes if "softmax" in n.name]
    assert len(names) == 5


@pytest.mark.parametrize(
    ("name", "technique", "message"),
    [
        ("class token", ToMe(r={5: 1}), "tome: r names block 5; class token has the blocks 0 to 4"),
        ("class token", ToMe(r={1: 8}), r"8 tokens at blocks\.1, where 15 patches are left; at most 7 of them can go"),
        ("class token", ToMe(r=4), r"4 tokens at blocks\.2, where 7 patches are left; at most 3 of them can go there"),
        (
            "class token",
            EViT(r={0: 15}),
            r"evit: r removes 15 tokens at blocks\.0, where 15 patches are left; at most 14",
        ),
        ("no class token", EViT(r={2: 3}), r"evit asks at blocks\.2 what the class token attends to, and .* has none"),
        ("no class token", ToMe(informativeness=0.3), r"tome asks at blocks\.2 .* informativeness 0 need none"),
        ("class token", TPS(r={1: 10}), r"10 tokens at blocks\.1, where 15 patches are left; at most 9 of them can go"),
        ("class token", Turbo(r={1: 10}), r"turbo: r removes 10 tokens at blocks\.1, where 15 patches .* at most 9 of"),
        ("no class token", Turbo(), r"turbo asks at blocks\.2 what the class token attends to, and .* has none"),
        ("no class token", TPS(), r"tps asks at blocks\.2 what the class token attends to, and .* has none"),
        ("hf vit", ToMe(r={1: 13}), r"13 tokens at model\.vit\.\S*1, where 25 patches are left; at most 12"),
    ],
)
def test_what_does_not_fit_names_the_block(name: str, technique: TokenReduction, message: str) -> None:
    model = build(name)
    before = logits(model)
    with pytest.raises(RecipeError, match=message) as error:
        apply(model, technique)
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("r", [-1, 2.5, True, "8", [8], {1: -2}, {"a": 1}, {1: 2.0}])
def test_a_schedule_is_tokens_or_tokens_by_block(r: object) -> None:
    with pytest.raises(RecipeError, match=r"tome: r is .*; it can be .*r: 8.*r: \{4: 64, 8: 32\}"):
        ToMe(r=r)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_of_at_least_0(alpha: float) -> None:
    with pytest.raises(RecipeError, match=r"turbo: alpha is .*; it can be 0 or a positive number"):
        Turbo(alpha=alpha)


def test_a_schedule_survives_yaml_and_json() -> None:
    recipe = Recipe((ToMe(r={8: 32, 4: 64}),))
    assert recipe.passes[0].settings() == {"r": {4: 64, 8: 32}}
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert ToMe(r={"4": 64, "8": 32}) == recipe.passes[0]
    assert hash(recipe.passes[0]) == hash(ToMe(r={4: 64, 8: 32}))


@pytest.mark.parametrize("technique", [ToMe(), TPS(), EViT(), Turbo(), Readout()])
def test_models_without_global_attention_are_refused(technique: TokenReduction | Readout) -> None:
    swin = timm.models.swin_transformer.SwinTransformer(  # type: ignore[attr-defined]
        img_size=(32, 16), patch_size=4, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4, num_classes=5
    )
    convolutions = timm.create_model("repvit_m0_9", embed_dim=[16] * 4, depth=[1] * 4)
    for module, message in ((swin, r"attention at layers\.0\.blocks\.0 is inside windows"), (convolutions, "RepVit")):
        model = Model(name="x", module=module.eval(), preprocess=Preprocess(size=(32, 16)), num_classes=5, origin={})
        with pytest.raises(SourceError, match=message):
            apply(model, technique)


def test_a_block_that_does_more_than_its_parts_is_refused() -> None:
    class Twice(timm.models.vision_transformer.Block):  # type: ignore[attr-defined]
        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            return super().forward(super().forward(x))

    MODELS["twice"] = lambda: timm_vit(block_fn=Twice)
    try:
        with pytest.raises(NumericsError, match=r"from blocks\.1 on, twice computes something that the parts"):
            apply(build("twice"), ToMe(r={1: 2}))
    finally:
        del MODELS["twice"]


def test_attention_masks_that_mask_are_refused() -> None:
    class Masked(timm.models.vision_transformer.VisionTransformer):  # type: ignore[attr-defined]
        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            return super().forward(x, attn_mask=torch.eye(16, dtype=torch.bool))

    MODELS["masked"] = lambda: Masked(**TIMM)
    try:
        with pytest.raises(NumericsError, match=r"from blocks\.1 on, masked computes something that the parts"):
            apply(build("masked"), ToMe(r={1: 2}))
    finally:
        del MODELS["masked"]


def test_two_reductions_in_one_recipe_are_refused() -> None:
    with pytest.raises(RecipeError, match="evit requires 'all_tokens', which passes\\[0\\] tome breaks"):
        pipeline.run(build("class token"), ToMe() | EViT(), Context())


def test_other_weights_take_the_record() -> None:
    model, other = build("class token"), build("class token")
    done = apply(model, ToMe(r={1: 4, 3: 2}, partition="2x2", informativeness=0.3))
    [step] = done.steps
    fresh = copy.deepcopy(other)
    step.technique.restore_(fresh, step.record)
    fresh.module.load_state_dict(done.module.state_dict(), strict=True)
    assert torch.equal(logits(fresh), logits(done))
