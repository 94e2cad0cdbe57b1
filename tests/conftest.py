"""What every test may use: real images and weights where there are some, fixed seeds, one thread, no network."""

import functools
import gc
import os
import random
import socket
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.onnx._internal.exporter import _registration

from martlet.graph import trace
from remembered_traces import remembering

settings.register_profile(
    "repeatable", deadline=None, derandomize=True
)  # a busy machine is slow, and no test is random
settings.load_profile("repeatable")

LOOPBACK = ("localhost", "127.", "::1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked `sampled(n)` every run asks n, evenly spread, and `make test-all` all."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for found in cases.values():
        n = min(found[0].get_closest_marker("sampled").args[0], len(found))
        asked = {i * len(found) // n for i in range(n)}
        for i, item in enumerate(found):
            if i not in asked:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with `data/` and `weights/`: MARTLET_ASSETS, else `shared` beside the checkout."""
    folder = Path(os.environ.get("MARTLET_ASSETS", Path(__file__).parents[2] / "shared"))
    if not ((folder / "data").is_dir() and (folder / "weights").is_dir()):
        pytest.skip(
            f"no real images and weights: {folder} has no data/ and weights/; set MARTLET_ASSETS to their folder"
        )
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums depend on how many threads share them; and several processes test at once, each with a core."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage() -> Iterator[None]:
    """What tests have imported is looked through at no collection of garbage: it is far more than what they make."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> Iterator[None]:
    """The exporter parses the source of every ONNX translation anew at each export; here once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        its = _registration.onnxscript_apis
        patch.setattr(its, "get_torchlib_ops", functools.cache(its.get_torchlib_ops))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_trace_of_a_model() -> Iterator[None]:
    """What tests trace again is remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "capture", remembering(trace.capture))
        yield


@pytest.fixture
def no_trace_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that change how a model is traced."""
    monkeypatch.setattr(trace, "capture", trace.capture.__wrapped__)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails; this machine may be reached."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
