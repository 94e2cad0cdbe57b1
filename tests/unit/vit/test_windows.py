"""Windows left out in whole models of every library: what is untouched, what is refused, engines, and the search."""

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from martlet import engine as engines
from martlet.core import pipeline, store
from martlet.core.errors import NumericsError, RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.preprocess import Preprocess
from martlet.source import load_model
from martlet.techniques.tokens.sparsevit import SparseViT, search_ratios
from martlet.vit import view
from martlet.vit.windows import install_windows_, num_windows

SIZE = (48, 40)
"""Grids 12 x 10 and 6 x 5, which windows of 5 don't fill."""
DEPTHS, HEADS = (3, 2), (1, 2)


def hf() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=SIZE, patch_size=4, embed_dim=8, depths=DEPTHS, num_heads=HEADS, window_size=5, num_labels=7
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.SwinForImageClassification(config)

        def forward(self, images: Tensor) -> Tensor:
            return self.model(pixel_values=images).logits

    return Logits()


MODELS = {
    "timm": lambda: SwinTransformer(
        img_size=SIZE, patch_size=4, embed_dim=8, depths=DEPTHS, num_heads=HEADS, window_size=5, num_classes=7
    ),
    "hf": hf,
    "torchvision": lambda: TorchvisionSwin([4, 4], 8, [*DEPTHS], [*HEADS], [5, 5], num_classes=7),
}


def build(name: str) -> Model:
    torch.manual_seed(1)
    module = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return Model(name=name, module=module, preprocess=Preprocess(size=SIZE), num_classes=7, origin={})


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(5))


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.module(images())


def apply(model: Model, technique: SparseViT) -> Model:
    return pipeline.run(model, Recipe((technique,)), Context())


@pytest.mark.parametrize("name", MODELS)
def test_windows_of_every_library(name: str) -> None:
    model = build(name)
    expected = logits(model)
    for nothing in (SparseViT(ratio=0), SparseViT(ratio={}), SparseViT(ratio={1: 0.0})):
        assert torch.equal(logits(apply(model, nothing)), expected)
    twin = model.copy()
    vit = view(twin.module)
    windows = num_windows(twin, vit, "sparsevit")
    assert windows == [6, 6, 6, 2, 2]
    install_windows_(vit.blocks, {0: 6, 1: 6, 4: 2})
    torch.testing.assert_close(logits(twin), expected, rtol=1e-4, atol=1e-4)
    done = apply(model, SparseViT(ratio={0: 0.5, 1: 0.7, 4: 0.5}))
    assert done.steps[0].record == {"windows": windows, "kept": [[0, 3], [1, 2], [4, 1]]}
    assert (logits(done) - expected).norm() / expected.norm() > 1e-3
    fresh = build(name)
    fresh.module.load_state_dict(done.module.state_dict(), strict=True)
    SparseViT().restore_(fresh, done.steps[0].record)
    assert torch.equal(logits(fresh), logits(done))


@pytest.mark.parametrize("name", MODELS)
def test_windows_that_are_left_out_pass_unchanged(name: str) -> None:
    done = apply(build(name), SparseViT(ratio={4: 0.5}))
    block, seen = view(done.module).blocks[4], list[tuple[Tensor, Tensor]]()

    def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor | tuple[Tensor, None]) -> None:
        seen.append((args[0].flatten(1, -2), (y[0] if isinstance(y, tuple) else y).flatten(1, -2)))

    block.module.register_forward_hook(hook)
    logits(done)
    [(x, y)] = seen
    moved = (x != y).any(-1).sum(1)  # tokens by image
    assert (moved > 0).all()
    assert (moved <= 25).all()  # of one window


def test_a_copy_is_pruned_by_itself() -> None:
    done = apply(build("timm"), SparseViT())
    twin = done.copy()
    expected = logits(done)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.zero_()
    assert torch.equal(logits(done), expected)
    with torch.no_grad():
        for key, parameter in done.module.named_parameters():
            if "relative_position" in key:
                parameter.zero_()
    assert not torch.equal(logits(done), expected)
    assert not logits(twin).any()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("engine_name", ["openvino", "onnxruntime"])
def test_engines_and_reloading_agree(engine_name: str, tmp_path: Path) -> None:
    if engine_name == "onnxruntime":
        pytest.importorskip("onnxruntime")
    engine = engines.get(engine_name)
    tiny = {"img_size": SIZE, "embed_dim": 12, "depths": (2,), "num_heads": (2,), "window_size": 5}
    model = load_model(
        "timm:swin_tiny_patch4_window7_224", model_kwargs=tiny, num_classes=7, seed=3, preprocess={"size": SIZE}
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    done = apply(model, SparseViT(ratio=0.4))
    expected = logits(done)
    store.seal(tmp_path, done, engine.name, store.write_model(tmp_path, done, engine))
    artifact = store.load(tmp_path)
    found = artifact.open(batch=3, threads=1)(images().numpy())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(artifact.model()), expected)
    assert not torch.allclose(expected, logits(model), rtol=1e-3, atol=1e-3)


def test_the_search_keeps_to_its_budget_and_beats_uniform_ratios() -> None:
    model = build("timm")
    found = search_ratios(model, [images(4)], 0.75, population=6, parents=3, generations=3)
    assert found.loss <= found.uniform_loss
    assert {*found.ratio} == {0, 1, 2, 3, 4}
    assert found.ratio[0] == found.ratio[1] <= found.ratio[2]
    assert found.ratio[3] == found.ratio[4]
    done = apply(model, SparseViT(ratio=found.ratio))
    with torch.no_grad():
        reference, logs = (m.module(images(4)).log_softmax(-1) for m in (model, done))
    assert float((reference.exp() * (reference - logs)).sum(-1).mean()) == pytest.approx(found.loss, rel=1e-4)
    asked = list[dict[int, int]]()

    def cost(kept: dict[int, int]) -> float:
        asked.append(dict(kept))
        return kept[0]

    by_table = search_ratios(model, [images(1)], 2, cost, population=3, parents=2, generations=2)  # type: ignore[arg-type]
    assert by_table.ratio[0] >= 0.7  # of six windows two stay
    assert all(len(kept) == 5 for kept in asked)
    with pytest.raises(RecipeError, match=r"sparsevit: a budget of 0\.01 can't be met: ratios of 0\.8 cost 0\."):
        search_ratios(model, [images(1)], 0.01)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, True, "0.3", [0.3], {0: 1.0}, {"a": 0.5}, {-1: 0.5}])
def test_a_ratio_is_a_share_or_shares_by_block(ratio: object) -> None:
    with pytest.raises(RecipeError, match=r"sparsevit: ratio is .*; it can be the share of windows"):
        SparseViT(ratio=ratio)


def test_ratios_survive_yaml_and_json() -> None:
    recipe = Recipe((SparseViT(ratio={1: 0.4, 0: 0.25}),))
    assert recipe.passes[0].settings() == {"ratio": {0: 0.25, 1: 0.4}}
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert SparseViT(ratio={"0": 0.25, "1": 0.4}) == recipe.passes[0]
    assert hash(recipe.passes[0]) == hash(SparseViT(ratio={0: 0.25, 1: 0.4}))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match="sparsevit: ratio names block 5; timm has the blocks 0 to 4"):
        apply(build("timm"), SparseViT(ratio={5: 0.5}))
    vit = load_model("timm:vit_tiny_patch16_224", model_kwargs={"depth": 1, "img_size": 32}, num_classes=7)
    with pytest.raises(RecipeError, match=r"sparsevit leaves out windows, and attention at blocks\.0 is global"):
        apply(vit, SparseViT())
    model = build("timm")
    [*blocks] = view(model.module).blocks
    whole = type(blocks[1].module).forward
    blocks[1].module.forward = lambda x: whole(blocks[1].module, whole(blocks[1].module, x))
    with pytest.raises(NumericsError, match=r"from layers\.0\.blocks\.1 on, timm computes something that the parts"):
        apply(model, SparseViT(ratio={1: 0.5}))
