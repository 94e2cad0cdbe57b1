"""Whether searched ratios of windows lose less than one ratio: `benchmarks/token_studies.py windows`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import small_models
from martlet.cli.terminal import working
from martlet.core import pipeline
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data import open_images
from martlet.measure.fidelity import fidelity
from martlet.measure.macs import macs
from martlet.techniques.tokens.sparsevit import SparseViT, search_ratios
from setups import cifar

SIDE = 64
"""Pixels, twice those that the Swin was trained at: it has 16 windows in its first stage, and 4 in its second."""
SEARCH, TEST = 128, 2000
BUDGETS = (0.8, 0.65, 0.5)
"""Shares of the MACs of all blocks."""


def windows(assets: Path, seed: int, known: set[str]) -> Iterator[dict[str, Any]]:
    """The Swin of `benchmarks/small_models.py` under budgets, by searched ratios and by one ratio in all blocks."""
    small = small_models.SMALL["swin"]
    larger = replace(small, size=SIDE, kwargs={**small.kwargs, "img_size": SIDE})
    model = larger.load(small_models.KEPT / "swin.safetensors")
    pool, data = {}, assets / "data" / "cifar10"
    for part, n in (("train", SEARCH), ("test", TEST)):
        pool[part] = cifar.read(open_images(data / f"{part}.parquet", limit=n, seed=seed), model)
    (images, _), (x, labels) = pool["train"], pool["test"]
    reference, macs_float = cifar.logits(model, x).numpy(), macs(model)
    for budget in BUDGETS:
        names = f"{budget:.0%}, one ratio", f"{budget:.0%}, searched"
        if known.issuperset(names):
            continue
        with working(f"{budget:.0%}"):
            found = search_ratios(model, [images], budget, population=24, parents=8, generations=6, seed=seed)
        for name, ratio in zip(names, (found.uniform_ratio, found.ratio), strict=True):
            if name in known:
                continue
            recipe = Recipe((SparseViT(ratio=ratio),))
            fewer = pipeline.run(model, recipe, Context())
            its = cifar.logits(fewer, x).numpy()
            yield {
                "name": name,
                "model": f"{model.name} at {SIDE} pixels",
                "weights": model.origin["weights"],
                "recipe": recipe.to_yaml(),
                "images": f"CIFAR-10, {SEARCH} training images to search on, {TEST:,} to test",
                "n": TEST,
                "macs": macs(fewer),
                "macs_float": macs_float,
                "top1_float_pct": 100 * float((reference.argmax(1) == labels.numpy()).mean()),
                "top1_pct": 100 * float((its.argmax(1) == labels.numpy()).mean()),
                "kl_mean": fidelity(reference, its)["kl_mean"],
            }
