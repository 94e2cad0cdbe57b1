"""What half an hour of search finds for a ViT-Ti, beside what anybody has without one.

    python benchmarks/search.py        # 30 minutes on two quiet cores

Runs the search that `martlet search` is, with real weights and images, in --work, where a search that was stopped goes
on, and writes what it measured to results/search.json.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peers
from martlet.cli.terminal import note, working
from martlet.core.errors import MartletError
from martlet.recipe_search.whole import search
from martlet.source import load_model
from setups.cifar import ASSETS

MODEL, WEIGHTS = "timm:vit_tiny_patch16_224", "vit_tiny_patch16_224.in1k.safetensors"
IMAGES = Path("imagenet1k-val-227px", "test.parquet")
MAX_DROP, MINUTES = 1.0, 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Searches, and writes what was found. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results" / "search.json")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with data and weights")
    parser.add_argument("--work", type=Path, default=Path("runs/search"), help="where the search is kept")
    options = parser.parse_args(argv)
    try:
        source = load_model(MODEL, weights=options.assets / "weights" / WEIGHTS)
        images = options.assets / "data" / IMAGES
        with working("search") as progress:
            found = search(
                source,
                images=images,
                out=options.work,
                max_drop=MAX_DROP,
                minutes=options.minutes,
                progress=progress,
            )
    except MartletError as error:
        note(str(error))
        return error.exit_status
    peers.write(options.out, told(found.document, options.minutes, WEIGHTS, IMAGES.parts[0]))
    note(found.why)
    return 0


def told(document: Mapping[str, Any], minutes: float, weights: str, source: str) -> dict[str, Any]:
    """What doesn't depend on where the search was run. source: of the images."""
    job = document["job"]
    points = [{k: v for k, v in point.items() if k not in ("command", "id")} for point in document["points"]]
    return {
        "benchmark": "search",
        "created": document["created"],
        "model": job["model"]["name"],
        "weights": weights,
        "engine": job["engine"],
        "images": {k: job["images"][k] for k in ("searched", "calibration", "held_out")} | {"source": source},
        "budget": job["budget"],
        "minutes": minutes,
        "seconds": document["seconds"],
        "candidates": Counter(point["stage"] for point in points if point["kind"] == "candidate"),
        "lost": len(document["lost"]),
        "points": [point for point in points if point["stage"] == "final"],
        "hypervolume": document["hypervolume"],
        "environment": document["environment"],
    }


if __name__ == "__main__":
    sys.exit(main())
