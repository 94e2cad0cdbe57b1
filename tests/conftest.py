"""What every test may use: real images and weights where there are some, fixed seeds, one thread, no network."""

import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile(
    "repeatable", deadline=None, derandomize=True
)  # a busy machine is slow, and no test is random
settings.load_profile("repeatable")

LOOPBACK = ("localhost", "127.", "::1")


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
