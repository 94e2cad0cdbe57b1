"""Screening in real processes of Ray's: one is killed and one is frozen, and the same comes out."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from martlet import engine
from martlet.core.technique import silent
from martlet.recipe_search import workers
from martlet.recipe_search.screen import Held, Screen, screened
from martlet.recipe_search.space import Supply
from martlet.source import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ray = pytest.importorskip("ray")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
RECIPES = [
    f"martlet: 1\npasses:\n- tps: {{r: {{1: {r}}}}}\n- int8: {{ranges: {ranges}}}\n"
    for r in (2, 4, 6)
    for ranges in ("minmax", "mse")
] + ["martlet: 1\npasses:\n- svd: {ratio: 0.99}\n"]
"""The last can't be: no rank is so low."""


@pytest.fixture(scope="module")
def screen() -> Screen:
    source = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)
    rng = np.random.default_rng(0)
    import torch

    batches = [torch.from_numpy(rng.standard_normal((4, 3, 32, 32), dtype=np.float32)) for _ in range(3)]
    return Screen(source, engine.get("openvino"), Supply(calibration=Held(batches[:1])), Held(batches[1:]), 0)


def values(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if key not in ("seconds", "lost")}


def runs(pid: int, seconds: float = 30.0) -> bool:
    """Whether there is such a process after so long; one that has ended and that nobody has asked about is none."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.1)
    return True


def test_a_process_killed_and_one_frozen_cost_their_candidates_only(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start = time.monotonic()
    expected = [values(screened(screen, yaml)) for yaml in RECIPES]
    # A machine under load isn't frozen: all of them, in this process, take as long as one may at most in another.
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", max(20.0, 2 * (time.monotonic() - start)))
    monkeypatch.setattr(workers, "PATIENCE", 10)
    with workers.workers(screen, 2, None, silent) as evaluate:
        first, second = (pid for _, pid in evaluate._processes.values())
        assert len({first, second, os.getpid()}) == 3

        def harm() -> None:
            time.sleep(0.5)
            os.kill(first, signal.SIGKILL)
            os.kill(second, signal.SIGSTOP)

        threading.Thread(target=harm).start()
        found = dict(evaluate(RECIPES))
        assert len(evaluate._processes) == 2
    assert [values(found[i]) for i in range(len(RECIPES))] == expected
    lost = [(seconds, why) for entry in found.values() for seconds, why in entry.get("lost", [])]
    assert {why for _, why in lost} == {"its process was killed", "its process did nothing for too long"}
    assert all(seconds > 0 for seconds, _ in lost)
    assert "why" in found[len(RECIPES) - 1]
    assert not any(map(runs, (first, second)))


def test_a_candidate_that_kills_its_process_is_given_up(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deadly(workers.Screener):
        def screened(self, yaml: str):
            if "minmax" in yaml:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().screened(yaml)

    monkeypatch.setattr(workers, "Screener", Deadly)
    with workers.workers(screen, 1, None, silent) as evaluate:
        found = dict(evaluate(RECIPES[:2]))
    assert found[0]["why"] == "its process was killed, 3 times"
    assert len(found[0]["lost"]) == workers.ATTEMPTS
    assert "why" not in found[1]
