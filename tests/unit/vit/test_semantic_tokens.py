"""Semantic tokens in whole models: what blocks get, what they save, what is refused, and that traces agree."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.preprocess import Preprocess
from martlet.graph.probe import shapes
from martlet.graph.trace import trace
from martlet.techniques.tokens.stvit import STViT
from martlet.vit import view

SIZE = (40, 24)
"""Patches 5 by 3: odd in number."""


def timm_vit(**kwargs: object) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 3, "num_classes": 7}
    return VisionTransformer(**(sizes | kwargs))  # type: ignore[arg-type]


def build(module: nn.Module, size: tuple[int, int] = SIZE) -> Model:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return Model(name="tiny", module=module.eval(), preprocess=Preprocess(size=size), num_classes=7, origin={})


def apply(model: Model, technique: STViT) -> Model:
    return pipeline.run(model, Recipe((technique,)), Context())


def logits(model: Model) -> Tensor:
    size = model.preprocess.size
    with torch.no_grad():
        return model.module(torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(5)))


def tokens_of(model: Model) -> list[int]:
    """How many tokens each block's MLP gets."""
    seen: list[int] = []
    for block in view(model.module).blocks:
        block.mlp.module.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    logits(model)
    return seen


def test_later_blocks_get_semantic_tokens() -> None:
    assert tokens_of(apply(build(timm_vit()), STViT())) == [16, 13, 13, 13, 1]
    assert tokens_of(apply(build(timm_vit()), STViT(tokens=[2, 3], at=2))) == [16, 16, 7, 7, 1]
    assert tokens_of(apply(build(timm_vit()), STViT(tokens=[2, 3], at=3))) == [16, 16, 16, 7, 1]
    gap = {"class_token": False, "global_pool": "avg"}
    assert tokens_of(apply(build(timm_vit(**gap)), STViT(tokens=[2, 2], at=1))) == [15, 4, 4, 4, 4]
    recovered = STViT(tokens=[2, 2], at=1, recover=True)
    assert tokens_of(apply(build(timm_vit(**gap)), recovered)) == [15, 4, 4, 4, 15]


def test_recovered_patches_differ_within_a_cell() -> None:
    found = list[Tensor]()
    for recover in (False, True):
        done = apply(build(timm_vit(class_token=False, global_pool="avg")), STViT(tokens=[1, 1], at=1, recover=recover))
        done.module.blocks[-1].register_forward_hook(lambda _, __, y: found.append(y))  # type: ignore[index]
        logits(done)
    alike, restored = found
    assert alike.shape == restored.shape == (3, 15, 24)
    assert torch.equal(alike, alike[:, :1].expand_as(alike))
    assert (restored - restored[:, :1]).abs()[:, 1:].amax((1, 2)).min() > 0.1


def test_another_library_traced_and_restored() -> None:
    model = build(TorchvisionViT(40, 8, 4, 3, 24, 40, num_classes=7), (40, 40))
    done = apply(model, STViT(tokens=[2, 2], at=1))
    graph = trace(done.module, model.preprocess.size)
    assert shapes(graph)  # which is what quantizing begins with
    images = torch.randn(2, 3, *model.preprocess.size)
    with torch.no_grad():
        torch.testing.assert_close(graph(images), done.module(images), rtol=1e-4, atol=1e-4)
    [step] = done.steps
    fresh = model.copy()
    step.technique.restore_(fresh, step.record)
    assert torch.equal(logits(fresh), logits(done))


def test_deit_small_with_sixteen_tokens_has_the_papers_macs() -> None:
    """4.6 G and 1.9 G there: 58 % fewer."""
    counted = []
    for record in (None, {"at": 4, "tokens": [4, 4], "num_tokens": 197, "num_read": 1}):
        with torch.device("meta"):
            module = timm.create_model("deit_small_patch16_224").eval()
        if record is not None:
            model = Model(
                name="deit", module=module, preprocess=Preprocess(size=(224, 224)), num_classes=1000, origin={}
            )
            STViT().restore_(model, record)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, 3, 224, 224, device="meta"))
        counted.append(counter.get_total_flops() / 2e9)
    assert counted[0] == pytest.approx(4.6, abs=0.05)
    assert counted[1] == pytest.approx(1.95, abs=0.05)
    assert 0.55 < 1 - counted[1] / counted[0] < 0.6


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (STViT(at=4), "at is 4, and tiny has 5 blocks; 2 of them must be left"),
        (STViT(at=3, recover=True), "at is 3, and tiny has 5 blocks; 3 of them must be left"),
        (STViT(tokens=[5, 4]), r"tokens is \[5, 4\] at blocks\.1, where the patches of tiny stand 5 by 3"),
        (STViT(recover=True), "recover gives back patches, of which the head of tiny reads none"),
    ],
)
def test_what_does_not_fit_is_refused(technique: STViT, message: str) -> None:
    with pytest.raises(RecipeError, match=f"stvit: {message}"):
        apply(build(timm_vit()), technique)
    with pytest.raises(RecipeError, match="stvit averages cells of a grid, and the patches of tiny aren't the one"):
        apply(build(timm_vit(img_size=24, dynamic_img_size=True)), STViT())


@pytest.mark.parametrize("settings", [{"tokens": 16}, {"tokens": [4]}, {"tokens": [0, 4]}, {"at": -1}, {"at": "1"}])
def test_settings_are_a_grid_and_a_block(settings: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=rf"stvit: {next(iter(settings))} is .*; it can be "):
        STViT(**settings)  # type: ignore[arg-type]


def test_settings_survive_yaml() -> None:
    recipe = Recipe((STViT(tokens=[2, 3], at=1, recover=True),))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert hash(recipe.passes[0]) == hash(STViT(tokens=(2, 3), at=1, recover=True))
