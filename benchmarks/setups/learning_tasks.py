"""What ways to learn are compared on: models, images of theirs, and what is measured besides top-1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import peers
import small_models
import train
from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.data import open_images
from martlet.data.calibration import Calibration
from martlet.data.examples import Examples
from martlet.merging.technique import Finetune
from martlet.source import load_model
from martlet.training.job import train as martlet_train
from martlet.vit.image_size import set_image_size_
from martlet.vit.view import view
from setups.cifar import CLASSES, preprocess
from setups.tuning_tasks import base, few, renewed, vit_tiny

if TYPE_CHECKING:
    from torch import Tensor

    from martlet.data.images import Images

FEW, ALL, NUM_TEST = 2000, 50_000, 5000
"""Images of CIFAR-10 to learn from, and others to test on."""
FEWEST = 128
"""Images of ImageNet to learn from, where rounding is learned."""
PIXELS = 64
"""The side of images that ViT-Ti is tuned on, which has patches of 16."""
MOST, IMBALANCE, TAIL = 1000, 100, 3
"""Long-tailed: images of the first class, how many times fewer the last has, and classes that are rare."""
LOOKED_AT = 256
"""Images that tell what a fine-tune depends on."""
ALONE = "martlet: 1\npasses: [{}]"


@dataclass(frozen=True, kw_only=True)
class Start:
    """What all recipes of a comparison are given.

    pool: the images that are learned from, of which so many are to calibrate with.
    """

    model: Model
    pool: Images
    images: Examples
    test: Examples
    teacher: Model | None = None
    finetunes: Sequence[Finetune] = ()
    calibrated_on: int = 64

    @cached_property
    def top1_pct(self) -> float:
        """Of the model before any recipe."""
        return train.top1(self.model, self.test)


def _start(
    model: Model,
    assets: Path,
    seed: int,
    progress: Progress,
    *,
    images: int = FEW,
    teacher: Model | None = None,
) -> Start:
    """With images of CIFAR-10, drawn by the seed, and always the same to test on."""
    folder = assets / "data" / "cifar10"
    pool = open_images(folder / "train.parquet", limit=images, seed=seed)
    test = open_images(folder / "test.parquet", limit=NUM_TEST, seed=0)
    return Start(
        model=model,
        pool=pool,
        images=Examples.read(pool, model.preprocess, CLASSES, progress),
        test=Examples.read(test, model.preprocess, CLASSES, progress),
        teacher=teacher,
    )


def random(assets: Path, folder: Path, seed: int, progress: Progress, images: int = FEW) -> Start:
    """A small ViT with random weights."""
    return _start(train.small(None, seed), assets, seed, progress, images=images)


def trained(assets: Path, folder: Path, seed: int, progress: Progress, images: int = FEW) -> Start:
    """A small ViT that knows CIFAR-10."""
    model = train.small(assets)
    return _start(model, assets, seed, progress, images=images, teacher=model)


def student(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
    """A ViT of half the width with random weights, and the small one to teach it."""
    model = load_model(
        "timm:vit_tiny_patch16_224",
        weights=None,
        seed=seed,
        model_kwargs={**train.KWARGS, "embed_dim": 64, "num_heads": 2},
        num_classes=CLASSES,
        preprocess=preprocess(32),
    )
    return _start(model, assets, seed, progress, teacher=train.small(assets))


def convolutions(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
    """An EfficientNetV2 of half the width and depth with random weights."""
    model = load_model(
        "timm:tf_efficientnetv2_b0",
        weights=None,
        seed=seed,
        model_kwargs={"channel_multiplier": 0.5, "depth_multiplier": 0.5},
        num_classes=CLASSES,
        preprocess=preprocess(64),
    )
    return _start(model, assets, seed, progress)


def mobilenet(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
    """A small MobileNetV2 that knows CIFAR-10, and all images that it was trained on."""
    model = small_models.load("mobilenet", small_models.KEPT)
    return _start(model, assets, seed, progress, images=ALL, teacher=model)


def long_tailed(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
    """A ViT with a distillation token, few images of some classes, and a ResNet that was trained on these by `sam`.

    It saw images of all classes as often, as the paper's teachers weigh them: one that never says the rare ones has
    nothing to teach of them.
    """
    student, net = (
        load_model(
            spec,
            weights=None,
            seed=seed,
            model_kwargs=kwargs,
            num_classes=CLASSES,
            preprocess=preprocess(side),
        )
        for spec, kwargs, side in (
            ("timm:deit_tiny_distilled_patch16_224", train.KWARGS, 32),
            ("timm:resnet10t", {"channels": (32, 64, 128, 256)}, 64),
        )
    )
    whole = _start(student, assets, seed, progress, images=2 * MOST * CLASSES)
    rows = rare(whole.images.labels, seed)
    images = whole.images.take(rows)
    recipe = Recipe.from_yaml(ALONE.format("sam: {epochs: 15.0, batch: 64, rate: 0.001}"))
    seen = images.take(balanced(images.labels, len(images), seed))
    context = Context(training=seen.at(net.preprocess), seed=seed, progress=progress)
    return replace(whole, images=images, teacher=pipeline.run(net, recipe, context))


def rare(labels: Tensor | None, seed: int) -> Tensor:
    """Rows of labels, of class k so many that they fall by the same factor from class to class."""
    import torch

    assert labels is not None
    chance, chosen = np.random.default_rng(seed), []
    for k in range(CLASSES):
        n = round(MOST * IMBALANCE ** (-k / (CLASSES - 1)))
        chosen.append(chance.permutation(np.flatnonzero(labels.numpy() == k))[:n])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def imagenet(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
    """ViT-Ti with ImageNet weights, and images of ImageNet without labels."""
    model = vit_tiny(assets)
    pool = open_images(assets / "data" / peers.VALIDATION / "test.parquet", limit=FEWEST, seed=seed)
    test = open_images(assets / "data" / peers.SAMPLE / "test.parquet")
    images = Calibration(pool, model.preprocess, n=FEWEST, seed=seed)
    return Start(
        model=model,
        pool=pool,
        images=Examples.unlabelled(images, model.preprocess),
        test=Examples.read(test, model.preprocess, 1000, progress),
        calibrated_on=FEWEST,
    )


def balanced(labels: Tensor | None, n: int, seed: int) -> Tensor:
    """About n rows of labels, of each class as many, drawn again where there are fewer."""
    import torch

    assert labels is not None
    chance = np.random.default_rng(seed)
    own = [np.flatnonzero(labels.numpy() == k) for k in range(CLASSES)]
    chosen = [chance.choice(rows, n // CLASSES, replace=len(rows) < n // CLASSES) for rows in own]
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def tuned(assets: Path, folder: Path, seed: int, progress: Progress, pixels: int = PIXELS, images: int = FEW) -> Start:
    """ViT-Ti with ImageNet weights and a new classifier, on small images."""
    model = base(assets, seed)
    set_image_size_(model, (pixels, pixels))
    return _start(model, assets, seed, progress, images=images)


def merged_tokens(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
    """As `tuned`, with as many patches that some can be merged."""
    return tuned(assets, folder, seed, progress, pixels=96, images=FEW // 2)


def prompted(shots: int) -> Callable[[Path, Path, int, Progress], Start]:
    """As `tuned`, with so many images a class; and prompts in the folder, from Tiny-ImageNet."""

    def start(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
        its = tuned(assets, folder, seed, progress)
        model = renewed(its.model.copy(), 200, seed)
        recipe = Recipe.from_yaml(ALONE.format("vpt: {epochs: 3.0, batch: 64, rate: 0.005}"))
        images = open_images(assets / "data" / "tiny-imagenet-200" / "train.parquet", limit=FEW, seed=seed)
        martlet_train(model, images=images, recipe=recipe, out=folder / "prompts", seed=seed, progress=progress)
        return replace(its, images=few(assets, its.model, shots, seed))

    return start


def classes(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
    """As `tuned`, its classifier learned, and two fine-tunes of it, of five classes each, drawn by the seed."""
    import torch

    its = probed(assets, folder, seed, progress)
    labels = its.images.labels
    assert labels is not None
    halves = np.array_split(np.random.default_rng(seed).permutation(CLASSES), 2)
    own = [its.images.take(torch.from_numpy(np.flatnonzero(np.isin(labels.numpy(), half)))) for half in halves]
    return replace(its, finetunes=_finetunes(its.model, own, seed, progress))


def domains(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
    """As `tuned`, its classifier learned, and five fine-tunes of it, each of images that were changed in one way.

    The seed draws their order. Tested on images of which a fifth is changed in each way.
    """
    its = probed(assets, folder, seed, progress)
    own = [
        _with(its.images, CHANGES[i](its.images.pixels)) for i in np.random.default_rng(seed).permutation(len(CHANGES))
    ]
    tested = its.test.pixels.clone()
    for i, change in enumerate(CHANGES):
        tested[i :: len(CHANGES)] = change(tested[i :: len(CHANGES)])
    return replace(its, test=_with(its.test, tested), finetunes=_finetunes(its.model, own, seed, progress))


CHANGES: Sequence[Callable[[Tensor], Tensor]] = (
    lambda pixels: pixels,
    lambda pixels: 255 - pixels,
    *(lambda pixels, turns=turns: pixels.rot90(turns, (2, 3)) for turns in (1, 2, 3)),
)
"""Of bytes (N, 3, H, W): none, colors inverted, turned by a quarter, a half and three quarters."""


def probed(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
    """As `tuned`, its classifier learned."""
    its = tuned(assets, folder, seed, progress)
    probe = Recipe.from_yaml(ALONE.format("probe: {epochs: 5.0, batch: 64, rate: 0.01}"))
    return replace(its, model=pipeline.run(its.model, probe, Context(training=its.images, seed=seed)))


def deep(assets: Path, folder: Path, seed: int, progress: Progress) -> Start:
    """As `probed`, with as many images to calibrate with as fits by least squares take."""
    return replace(probed(assets, folder, seed, progress), calibrated_on=512)


def _with(examples: Examples, pixels: Tensor) -> Examples:
    return Examples(pixels, examples.labels, examples.preprocess, examples.source)


def _finetunes(model: Model, own: Sequence[Examples], seed: int, progress: Progress) -> tuple[Finetune, ...]:
    """One of each task's images."""
    recipe, found = Recipe.from_yaml(ALONE.format("finetune: {epochs: 5.0, batch: 32, rate: 0.0001}")), []
    for i, images in enumerate(own):
        state = pipeline.run(model, recipe, Context(training=images, seed=seed, progress=progress)).module.state_dict()
        looked_at = images.batches(LOOKED_AT, seed)
        found.append(Finetune(name=f"task {i}", read=lambda state=state: state, images=looked_at))
    return tuple(found)


def before(model: Model, start: Start) -> float:
    """Top-1 of what the recipe began from, in percent."""
    return start.top1_pct


def eigenvalue(model: Model, start: Start, images: int = 256, rounds: int = 15) -> float:
    """The largest of the loss's Hessian by all weights, on images that were learned from, by power iteration."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    module, parameters = model.module, [*model.module.parameters()]
    assert start.images.labels is not None
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
        logits = module(start.images.normalize(start.images.pixels[:images]))
    loss = functional.cross_entropy(logits, start.images.labels[:images])
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)

    def farthest(shift: float) -> float:
        """The eigenvalue that is farthest from -shift."""
        generator = torch.Generator().manual_seed(0)
        vectors = [torch.randn(p.shape, generator=generator) for p in parameters]
        value = 0.0
        for _ in range(rounds):
            norm = torch.stack([v.square().sum() for v in vectors]).sum().sqrt()
            vectors = [v / norm for v in vectors]
            product = torch.autograd.grad(gradients, parameters, vectors, retain_graph=True)
            value = float(torch.stack([(v * p).sum() for v, p in zip(vectors, product, strict=True)]).sum())
            vectors = [p.detach() + shift * v for v, p in zip(vectors, product, strict=True)]
        return value

    found = farthest(0.0)
    return found if found > 0 else farthest(-found)  # the most negative one was


def active(model: Model, start: Start, images: int = 256) -> float:
    """Hidden units of the first block's MLP that are above 0, in percent of all, over tokens of test images."""
    import torch

    found: list[Tensor] = []
    fc1 = model.module.get_submodule(view(model.module).blocks[0].mlp.fc1.name)
    hook = fc1.register_forward_hook(lambda _m, _x, hidden: found.append(hidden > 0))
    try:
        with torch.inference_mode():
            model.module(start.test.normalize(start.test.pixels[:images]))
    finally:
        hook.remove()
    return 100 * float(found[0].float().mean())


def tail(model: Model, start: Start) -> float:
    """Top-1 of test images of the rare classes, in percent."""
    return train.top1(model, _rare(start.test))


def tail_of_class(model: Model, start: Start) -> float:
    """The same, by what the class token says alone."""
    return _tail_of(model, start, "head")


def tail_of_teacher(model: Model, start: Start) -> float:
    """The same, by what the token says that learned from the teacher."""
    return _tail_of(model, start, "head_dist")


def _tail_of(model: Model, start: Start, head: str) -> float:
    """With the other head silent, for the model answers with the mean of both."""
    import torch

    twin = model.copy()
    other = {"head": "head_dist", "head_dist": "head"}[head]
    with torch.no_grad():
        for parameter in twin.module.get_submodule(other).parameters():
            parameter.zero_()
    return train.top1(twin, _rare(start.test))


def _rare(test: Examples) -> Examples:
    assert test.labels is not None
    return test.take((test.labels >= CLASSES - TAIL).nonzero()[:, 0])
