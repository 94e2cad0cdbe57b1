"""What fewer tokens gain in PyTorch: steps of training that skip, and images of any shape that are packed.

`benchmarks/token_studies.py throughput` fills in the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import timm
import torch
from timm.models.naflexvit import NaFlexVit, batch_patchify
from torch import Tensor, nn
from torch.nn import functional

from martlet.cli.terminal import working
from martlet.core import pipeline, registry
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data import open_images
from martlet.data.packing import padding_ratio
from martlet.measure import latency
from martlet.source import load_model
from martlet.vit.packed import PackedViT

SKIPPING, STEP_BATCH = "vit_small_patch16_224", 8
PACKED: Mapping[str, Any] = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
NUM_IMAGES, PADDED_BATCH, LENGTH, MOST, SEQUENCES = 48, 16, 512, 8, 4
"""Images, how many are padded to the longest of them, tokens and images of a sequence, and sequences of a batch."""
PATCHES = (64, 256)
"""Of an image: as many as are drawn, in the shape that the picture has."""


class Settings(Protocol):
    """Of what is timed. seconds: of one entry, a third."""

    seconds: float
    seed: int


def throughput(assets: Path, settings: Settings, known: set[str]) -> Iterator[dict[str, Any]]:
    """Each in turns with what it is held against, float32."""
    seed, seconds = settings.seed, settings.seconds
    for name, entry in (("a step that skips", skipping), ("packed images", packed)):
        if name not in known:
            with working(name) as progress:
                runs, about = entry(assets, seed)
                ms = latency.interleave(runs, seed=seed, min_seconds=3 * seconds, max_seconds=120, progress=progress)
                whole, fewer = runs
            yield {
                "name": name,
                **about,
                "engine": {"name": "torch", "version": torch.__version__},
                "precision": "f32",
                "threads": torch.get_num_threads(),
                "latency_ms": {name: latency.summary(each) for name, each in ms.items()},
                "speedup": latency.ratio(ms[whole], ms[fewer], seed),
            }


def skipping(assets: Path, seed: int) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Steps of AdamW on a batch of noise: all tokens in all blocks, and 55 % of the patches that skip."""
    model = load_model(f"timm:{SKIPPING}", weights="random", seed=seed)
    technique = registry.technique("skipvit")()
    fewer = pipeline.run(model, Recipe((technique,)), Context())
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(STEP_BATCH, 3, *model.preprocess.size, generator=generator)
    labels = torch.randint(model.num_classes, (STEP_BATCH,), generator=generator)

    def step(module: nn.Module) -> Callable[[], object]:
        module.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(module.parameters(), 1e-4)

        def run() -> None:
            optimizer.zero_grad()
            functional.cross_entropy(module(images), labels).backward()
            optimizer.step()

        return run

    with torch.enable_grad():
        runs = {"all tokens": step(model.module), "skipping": step(fewer.module)}
    about = {"model": SKIPPING, "weights": "random", "batch": STEP_BATCH, "goal": 1.13, "recipe": technique.name}
    return runs, about


def packed(assets: Path, seed: int) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Logits of pictures of many shapes and sizes: batches padded to their longest, and sequences of one length.

    From images to logits, so that the time that packing takes counts too.
    """
    torch.manual_seed(seed)
    model = cast(NaFlexVit, timm.create_model("naflexvit_base_patch16_gap", num_classes=1000, **PACKED).eval())
    images, side = shaped(assets, seed), int(PACKED["patch_size"])
    packer, lengths = PackedViT(model), [image[0].numel() // side**2 for image in images]

    def padded() -> Tensor:
        batches = [images[i : i + PADDED_BATCH] for i in range(0, len(images), PADDED_BATCH)]
        with torch.inference_mode():
            return torch.cat([model(*pad(batch, side)) for batch in batches])

    def sequences() -> Tensor:
        found = packer.pack(images, LENGTH, MOST)
        with torch.inference_mode():
            inputs = zip(*(each.split(SEQUENCES) for each in found.inputs()), strict=True)
            return found.logits(torch.cat([packer(*each) for each in inputs]))

    error = float((padded() - sequences()).abs().max() / padded().abs().max())
    count = len(packer.pack(images, LENGTH, MOST).patches)
    longest = [max(lengths[i : i + PADDED_BATCH]) for i in range(0, len(lengths), PADDED_BATCH)]
    about = {
        "model": f"naflexvit_base_patch16_gap {dict(PACKED)}",
        "weights": "random",
        "batch": NUM_IMAGES,
        "goal": 1.0,
        "relative_error": error,
        "padding_ratio": {
            "padded": 1 - sum(lengths) / (PADDED_BATCH * sum(longest)),
            "packed": padding_ratio(lengths, count, LENGTH),
        },
    }
    return {"padded": padded, "packed": sequences}, about


def shaped(assets: Path, seed: int) -> list[Tensor]:
    """Real images (3, H, W) in their own shapes, of so many patches as are drawn for each."""
    rng, side = np.random.default_rng(seed), int(PACKED["patch_size"])
    found, pictures = (
        [],
        open_images(assets / "data" / "imagenet1k-sample" / "test.parquet", limit=NUM_IMAGES, seed=seed),
    )
    for _, picture in pictures.map(lambda image: image.convert("RGB")):
        pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1) / 255
        patches, ratio = int(rng.integers(PATCHES[0], PATCHES[1] + 1)), pixels.shape[1] / pixels.shape[2]
        down = max(1, round((patches * ratio) ** 0.5))
        size = (down * side, max(1, patches // down) * side)
        found.append(functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0])
    return found


def pad(images: Sequence[Tensor], side: int) -> tuple[Tensor, Tensor, Tensor]:
    """As timm takes a padded batch: patches (B, N, P), their places (B, N, 2), and which there are (B, N)."""
    parts, places = [], []
    for image in images:
        patches, (down, across) = batch_patchify(image[None], (side, side))
        rows, columns = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
        parts.append(patches[0].flatten(1))
        places.append(torch.stack([rows.flatten(), columns.flatten()], -1))
    there = [torch.ones(len(part), dtype=torch.bool) for part in parts]
    pad_to = nn.utils.rnn.pad_sequence
    return pad_to(parts, True), pad_to(places, True), pad_to(there, True)
