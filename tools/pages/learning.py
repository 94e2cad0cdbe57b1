"""docs/learning.md: what ways to learn reach beside each other, from `benchmarks/learning.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from martlet.report.cards import table
from pages import measured_on, spread

BENCHMARK, PATH = "learning", "docs/learning.md"

ABOUT = {
    "random": "From random weights. `sam` is to end in a flatter place and reach more (arXiv 2106.01548), `coat` to "
    "reach as much with moments of 8 bits (2410.19313), and `skipvit` as much with 55 % of the patches going around "
    "blocks (2401.15293). *Curvature* is the largest eigenvalue of the loss's Hessian on 256 images that were learned "
    "from, *active* the share of the first MLP's hidden units above 0.",
    "few images": "From random weights, few images so often that `finetune` learns them by heart. A flatter place is "
    "to keep from that.",
    "augmented": "From random weights, with strong augmentation of few images. `dea` is to choose better ones than "
    "chance (2210.08363), in much less time than all take; *whole* sees all images without augmentation besides.",
    "grown": "An EfficientNetV2 of half the width and depth, from random weights at 64 pixels. `progressive` begins at "
    "32 and is to reach as much in less time (2104.00298).",
    "distilled": "A ViT of half the width, from random weights, taught by the small one. `fast_distill` asks the "
    "teacher once, and is to reach as much (2207.10666); *replayed* is another student of the same answers.",
    "long-tailed": "A small ViT with a distillation token, from random weights, on classes of which the first has 1000 "
    "images and the last 10; a ResNet teaches that was trained on these by `sam`, of each class as often. `deit` is "
    "`deit_lt` without weighing classes. `deit_lt` is to reach more on the three rare classes, and its distillation "
    "token more of them than its class token (2404.02900).",
    "quantized": "The small ViT that knows CIFAR-10, its weights rounded to 2 bits (simulated). `teacher_intervention` "
    "is to reach in half the steps what `lsq` does (2302.11812); *none* is the same without intervention.",
    "two bits": "ViT-Ti with ImageNet weights; weights of 2 bits with a scale for each output, activations of 8 "
    "(simulated), from images without labels. `gptq` leaves activations and the convolution of patches in floating "
    "point. Learning block by block, and then steps end to end, is to beat both (2407.11062).",
    "pruned": "The small ViT that knows CIFAR-10, 40 % of its MACs cut, and trained on its own answers. Rankings by "
    "curvature are to keep more than magnitude (`nvit`, 2110.04869).",
    "factorized": "The same, a third of its Linears' weights saved by low rank. `pela` is to bring back more than "
    "logits alone (2310.10700).",
    "shared": "The same, each two blocks sharing their weights: these alone, with mixtures of heads (`minivit`), and "
    "learning how tokens attend to each other too, each of which is to bring back more (2204.07154).",
    "shared, more images": "The same with five times the images.",
    "sparse": "The same, four of each eight weights zero in pairs; `gpusq-vit` is rounded to 4 bits on top (simulated) "
    "and is to lose a point at most (Yu et al., 2023).",
    "sparse, more images": "The same with five times the images, and `lsq` of as many epochs.",
    "sparse convolutions": "A MobileNetV2 of half the width that knows CIFAR-10, on all images: 80 and 90 % of the "
    "weights of its 1 × 1 convolutions become zero while it trains, which is to cost a point at most (1911.09723).",
    "unnormalized": "The same, its norms becoming constants that the Linears take over, which is to cost half a point "
    "at most (2208.01313).",
    "unnormalized, more images": "The same with five times the images, and a higher rate.",
    "never normalized": "A ViT of half the width, from random weights, taught by the small one: with norms of tokens, "
    "and with constants in their place from the start, as the paper trains.",
    "tuned": "ViT-Ti with ImageNet weights and a new classifier, at 64 pixels. `lora_ga` is to reach in half the steps "
    "what `lora` does (2407.05000), `light_peft` nearly as much with 40 % fewer weights in less time (2406.03792), "
    "`ladder` more than `probe` (2206.06522), and `sherl` as much as `ladder` (2407.07523), "
    "which *wider* takes about as much memory as: 120 and 130 MB of activations at 224 pixels, `sherl` 78.",
    "probed": "The same with a classifier that was learned first, so that the gradients that `lora_ga` begins from say "
    "something; it is to reach in half the steps what `lora` does.",
    "merged tokens": "ViT-Ti with ImageNet weights at 96 pixels, patches being merged by `tome`. `pyra` is to give "
    "back more of what that costs than `lora` (2403.09192).",
    "prompted by 1": "ViT-Ti with ImageNet weights at 64 pixels, one image a class. Prompts that begin from those of "
    "Tiny-ImageNet are to reach more than from chance (PVP).",
    "prompted by 2": "The same with two images a class.",
    "fewer blocks": "ViT-Ti at 64 pixels whose classifier knows CIFAR-10, without three of its twelve blocks, and "
    "tuned a little. Fusing them into the blocks before is to keep more than dropping the same (2411.14507).",
    "two fine-tunes": "ViT-Ti at 64 pixels whose classifier knows CIFAR-10 was tuned on five of the classes, and again "
    "on the other five; both are merged and tested on all ten. `fisher` is to keep more than the mean (2111.09832).",
    "five fine-tunes": "The same with fine-tunes of all classes, each of images changed in one way: not at all, colors "
    "inverted, or turned by a quarter, a half or three quarters; of the test images a fifth is changed in each way. "
    "`opcm`, which merges one at a time, in an order drawn by the seed, is to keep more than adding what each changed "
    "(2501.09522).",
}
"""By the benchmark's names, what is compared."""
MEASURES = {
    "eigenvalue": ("Curvature", "{:.0f}"),
    "active_pct": ("Active", "{:.1f} %"),
    "tail_pct": ("Rare classes", "{:.1f} %"),
    "tail_cls_pct": ("By the class token", "{:.1f} %"),
    "tail_dist_pct": ("By the distillation token", "{:.1f} %"),
    "before_pct": ("Before", "{:.1f} %"),
}
"""Heading and form of what is measured besides top-1."""


def page(document: Mapping[str, Any]) -> str:
    """A table a comparison, with the first way as what the others are held against."""
    comparisons: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in document["rows"]:
        comparisons[row["comparison"]].append(row)
    lines = [
        "# Ways to learn, compared",
        "",
        "Generated by `make docs` from `results/learning.json`, which `benchmarks/learning.py` measured.",
        "",
        "Where a paper says that one way to learn is better than another, both are given the same model and images "
        "here, seed by seed: small ones, for two cores. Top-1 is the mean over seeds, and the range. *Over the first* "
        "is the mean of the differences to the table's first way on the same seed, and how many are above it. Seconds "
        "are the processor's, in one thread, of the whole training; MACs are those that the way adds or saves. Where "
        "nothing else is said, the model is a ViT of 32 pixels and four blocks of 128 features, and images are "
        "CIFAR-10's.",
    ]
    for name, about in ABOUT.items():
        if rows := comparisons.get(name):
            lines += ["", f"## {name.capitalize()}", "", f"{about} {_images(rows)}", "", *_table(rows)]
    return "\n".join([*lines, "", measured_on(document["rows"]), ""])


def _images(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"Learned from {rows[0]['images']} images, tested on {rows[0]['n_images']} others."


def _change(removed: float) -> str:
    """In percent, where it rounds to any."""
    return f"{-removed:+.0%}" if abs(removed) >= 0.005 else "–"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    ways: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        ways[row["way"]][row["seed"]] = row
    first = next(iter(ways.values()))
    measures = [name for name in MEASURES if name in rows[0]]
    smaller = any(abs(row["macs_removed_ratio"]) > 0.01 for row in rows)
    timed = any(row["steps"] for row in rows)
    cells = []
    for way, its in ways.items():
        found = [*its.values()]
        over = [row["top1_pct"] - first[seed]["top1_pct"] for seed, row in its.items() if seed in first]
        cells.append(
            (
                way,
                f"`{found[0]['recipe']}`",
                spread([row["top1_pct"] for row in found]),
                "–" if its is first else f"{fmean(over):+.1f} ({sum(x > 0 for x in over)} of {len(over)})",
                *([str(found[0]["steps"]), f"{fmean(row['cpu_seconds'] for row in found):.0f}"] if timed else []),
                *([_change(fmean(row["macs_removed_ratio"] for row in found))] if smaller else []),
                *(MEASURES[name][1].format(fmean(row[name] for row in found)) for name in measures),
            )
        )
    headings = (
        "Way",
        "Recipe",
        "Top-1 %",
        "Over the first",
        *(["Steps", "Seconds"] if timed else []),
        *(["MACs"] if smaller else []),
        *(MEASURES[name][0] for name in measures),
    )
    return table(headings, cells)
