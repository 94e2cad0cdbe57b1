"""Screening in several processes at once, on this machine or on a Ray cluster.

A process that is killed, or does nothing for too long, costs what it was at: another takes its place and does that
candidate again. What was lost is told with it. Times on the engine are never taken here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from martlet.core.errors import EngineError, UsageError
from martlet.core.technique import Progress

if TYPE_CHECKING:
    from martlet.recipe_search.screen import Screen

ATTEMPTS = 3
"""How often a candidate is begun before it is given up."""
PATIENCE_SECONDS = 120.0
"""Of a candidate, at least, before its process is taken for frozen."""
PATIENCE = 10
"""Times the longest candidate so far."""
START_SECONDS = 300.0
"""Until a new process has to answer."""


@dataclass
class Task:
    """A candidate in a process. lost: seconds and reasons of earlier attempts."""

    place: int
    yaml: str
    attempts: int = 0
    lost: list[tuple[float, str]] = field(default_factory=list)
    begun: float = 0.0


class Screener:
    """What runs in a process of Ray's: it holds everything, and screens one recipe after the other."""

    def __init__(self, screen: Screen) -> None:
        import torch

        torch.set_num_threads(1)
        self._screen = screen

    def process(self) -> tuple[str, int]:
        """The machine and the number of the process."""
        return socket.gethostname(), os.getpid()

    def screened(self, yaml: str) -> dict[str, Any]:
        from martlet.recipe_search.screen import screened

        return screened(self._screen, yaml)


@dataclass
class Workers:
    """As many processes as asked for, each with one candidate at a time."""

    screen: Any
    """A reference to the Screen, in Ray's store."""
    count: int
    progress: Progress

    def __post_init__(self) -> None:
        self._longest = 0.0
        self._idle = self._start(self.count)

    def __call__(self, yamls: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields each recipe's place and what screening says, as they come."""
        import ray
        from ray import exceptions

        waiting = [Task(i, yaml) for i, yaml in enumerate(yamls)]
        running: dict[Any, tuple[Any, Task]] = {}
        done = 0
        while waiting or running:
            while waiting and self._idle:
                worker, task = self._idle.pop(), waiting.pop(0)
                task.attempts, task.begun = task.attempts + 1, time.monotonic()
                running[worker.screened.remote(task.yaml)] = worker, task
            self.progress("screen recipes", done, len(yamls))
            for reference in ray.wait(list(running), timeout=1.0)[0]:
                worker, task = running.pop(reference)
                try:
                    entry = ray.get(reference)
                except exceptions.RayActorError:
                    found = self._again(worker, task, "its process was killed", waiting)
                else:
                    self._longest = max(self._longest, time.monotonic() - task.begun)
                    self._idle.append(worker)
                    found = _with_losses(entry, task)
                if found:
                    done += 1
                    yield task.place, found
            patience = max(PATIENCE_SECONDS, PATIENCE * self._longest)
            for reference, (worker, task) in list(running.items()):
                if time.monotonic() - task.begun > patience:
                    del running[reference]
                    if found := self._again(worker, task, "its process did nothing for too long", waiting):
                        done += 1
                        yield task.place, found

    def _again(self, worker: Any, task: Task, why: str, waiting: list[Task]) -> dict[str, Any] | None:
        """Puts another process in a worker's place, and the candidate back; or says why it is given up."""
        task.lost.append((round(time.monotonic() - task.begun, 1), why))
        self._end(worker)
        self._idle += self._start(1)
        if task.attempts < ATTEMPTS:
            waiting.insert(0, task)
            return None
        return _with_losses({"why": f"{why}, {task.attempts} times", "seconds": 0.0}, task)

    def _start(self, count: int) -> list[Any]:
        """
        Raises:
            EngineError: the processes don't answer.
        """
        import ray
        from ray import exceptions

        remote: Any = ray.remote(num_cpus=0)(Screener)
        workers = [remote.remote(self.screen) for _ in range(count)]
        try:
            self._processes = getattr(self, "_processes", {}) | dict(
                zip(workers, ray.get([w.process.remote() for w in workers], timeout=START_SECONDS), strict=True)
            )
        except (exceptions.RayError, exceptions.GetTimeoutError) as error:
            raise EngineError(
                f"Ray's processes can't hold this model ({type(error).__name__}); search without --workers"
            ) from error
        return workers

    def _end(self, worker: Any) -> None:
        """A frozen process doesn't hear; on this machine it is killed by its number."""
        import ray
        from ray import exceptions

        machine, pid = self._processes.pop(worker)
        with contextlib.suppress(exceptions.RayError):
            ray.kill(worker)
        if machine == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _with_losses(entry: dict[str, Any], task: Task) -> dict[str, Any]:
    return entry | ({"lost": task.lost} if task.lost else {})


def check(count: int, address: str | None) -> None:
    """
    Raises:
        UsageError: Ray isn't installed, or no cluster answers.
    """
    if not count:
        if address:
            raise UsageError("--ray-address needs --workers: how many processes to start there")
        return
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("--workers needs Ray, which isn't installed: pip install 'martlet[ray]'") from None
    if address is None or address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--ray-address is HOST:PORT, ray://HOST:PORT or auto, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UsageError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one with `ray start --head`, or "
            "leave --ray-address out to use this machine"
        ) from None


@contextmanager
def workers(screen: Screen, count: int, address: str | None, progress: Progress) -> Iterator[Workers]:
    """Processes that screen, until the block ends.

    Raises:
        UsageError: no cluster is there. EngineError: the model can't be sent to other processes.
    """
    import ray

    local: dict[str, Any] = {} if address else {"num_cpus": count, "include_dashboard": False}
    if not address:
        # Ray would make its processes so nice that on a busy machine they get next to nothing, and seem frozen.
        local |= {"_node_ip_address": "127.0.0.1", "_system_config": {"worker_niceness": 0}}
    progress("start processes", 0, count)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address or 'this machine'} ({str(error).splitlines()[0]})"
        ) from error
    try:
        try:
            held = ray.put(screen)
        except (TypeError, AttributeError) as error:
            raise EngineError(
                f"this model can't be sent to other processes ({error}); search without --workers"
            ) from error
        yield Workers(held, count, progress)
    finally:
        ray.shutdown()
