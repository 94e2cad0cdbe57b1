"""Whole journeys run the command line in this process, so that heavy libraries are imported once."""

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from martlet.cli import main
from martlet.measure import latency, memory

TINY = "depth=2,img_size=32,patch_size=8,embed_dim=48,num_heads=3"


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def brief() -> Iterator[None]:
    """Everything is timed as always, but for a moment, and memory is measured once for each way to run: what is said
    of these numbers is tested, and not the numbers.
    """
    measure, known = memory.peak_rss_bytes, dict[object, int | None]()

    def once(engine: str, folder: Path, *how: object, **more: object) -> int | None:
        way = (engine, how, *more.items())
        if way not in known:
            known[way] = measure(engine, folder, *how, **more)  # type: ignore[arg-type]
        return known[way]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peak_rss_bytes", once)
        patch.setattr(latency, "interleave", functools.partial(latency.interleave, min_seconds=0.1, max_rounds=40))
        patch.setattr(latency, "throughput", functools.partial(latency.throughput, seconds=0.05))
        yield


@pytest.fixture(scope="session")
def martlet() -> Callable[..., Result]:
    """Runs `martlet ARGUMENTS…`."""

    def run(*arguments: object) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
        return Result(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """A model of two blocks for ten classes, as arguments."""
    return ["timm:vit_tiny_patch16_224", "--model-kwargs", TINY, "--num-classes", "10"]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """39 images of noise in ten classes, and one that is cut off; seed 0 doesn't draw it to calibrate on 8."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = root / f"class{i % 10}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    broken = root / "class1" / "21.png"
    broken.write_bytes(broken.read_bytes()[:500])
    return root
