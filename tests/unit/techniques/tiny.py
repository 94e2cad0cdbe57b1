"""Tiny models with odd features and every parameter random, and images, for the tests of techniques."""

import functools
from collections.abc import Callable, Iterator

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from martlet.core import pipeline, registry
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Stage
from martlet.data.preprocess import Preprocess

SIZE = (32, 32)


def vit(**settings: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**(sizes | settings))  # type: ignore[arg-type]


MODELS = {
    "class token": vit,
    "no class token, odd depth": lambda: vit(class_token=False, global_pool="avg", depth=3),
    "registers and qk-norm": lambda: vit(reg_tokens=2, qk_norm=True),
    "no biases": lambda: vit(qkv_bias=False, proj_bias=False),
    "swin": lambda: SwinTransformer(
        img_size=32, patch_size=4, embed_dim=24, depths=(2, 1), num_heads=(2, 3), window_size=4, num_classes=5
    ),
}


class Smooth:
    """Images whose neighbouring pixels are alike, as those of photographs are: so many in each batch.

    coarse: pixels a side that are drawn, the others lie between them. noise: what is added to each.
    """

    def __init__(
        self,
        seed: int = 5,
        batches: tuple[int, ...] = (8, 4),
        size: tuple[int, int] = SIZE,
        coarse: int = 6,
        noise: float = 0.0,
    ) -> None:
        self.seed, self.batches, self.size, self.coarse, self.noise = seed, batches, size, coarse, noise
        self.num_images = sum(batches)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for n in self.batches:
            few = torch.randn(n, 3, self.coarse, self.coarse, generator=generator)
            image = nn.functional.interpolate(few, self.size, mode="bilinear")
            yield image + self.noise * torch.randn(image.shape, generator=generator) if self.noise else image


@functools.cache
def _traced(name: str) -> Model:
    return drawn(MODELS[name])


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> Model:
    """Traced, with every parameter random, so that no bias is 0 and no scale 1."""
    torch.manual_seed(seed)
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    traced = wrap(module)
    pipeline.enter_(traced, Stage.GRAPH)
    return traced


def model(name: str) -> Model:
    """One of MODELS, drawn once."""
    return _traced(name).copy()


def wrap(module: nn.Module, size: tuple[int, int] = SIZE) -> Model:
    return Model(
        module=module.eval(),
        num_classes=5,
        name="tiny",
        origin={"source": "test", "weights": "random"},
        preprocess=Preprocess(size=size, resize=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    )


def compress(original: Model, name: str, **settings: object) -> Model:
    cls = registry.technique(name)
    few = {"steps": 2} if cls().steps else {}  # type: ignore[attr-defined]
    technique = cls(**({"weight_bits": 4, "activation_bits": 4} | few | settings))
    return pipeline.run(original, Recipe((technique,)), Context(images=Smooth(), seed=1))


def images(n: int = 3) -> Tensor:
    return next(iter(Smooth(9)))[:n]


def logits(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = module(x)
    return out[0] if isinstance(out, list | tuple) else out


def error(reference: Tensor, other: Tensor) -> float:
    return ((reference - other).norm() / reference.norm()).item()
