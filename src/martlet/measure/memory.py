"""Peak resident memory of running an artifact, in a process that does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from martlet.core.errors import EngineError

RUNS = 5


def peak_rss_bytes(
    engine: str, folder: Path, precision: str = "f32", threads: int | None = None, trust_code: bool = False
) -> int | None:
    """The most memory that a fresh process holds while it opens the engine's files at batch 1 and runs them.

    Counts everything resident: the interpreter and the engine's library too. None on Windows, which doesn't tell.

    Raises:
        EngineError: the process failed; says its last line.
    """
    if sys.platform == "win32":
        return None
    options = {"precision": precision, "threads": threads, "trust_code": trust_code}
    job = json.dumps({"engine": engine, "folder": str(folder), "options": options})
    process = subprocess.run([sys.executable, "-m", __name__, job], capture_output=True, text=True, check=False)
    if process.returncode:
        last = next(iter(reversed(process.stderr.strip().splitlines())), f"exit status {process.returncode}")
        raise EngineError(f"{engine} failed while its memory was measured: {last}")
    return int(process.stdout.splitlines()[-1])


def main(job: str) -> None:
    """Opens, runs on zeros, and prints the peak in bytes."""
    import numpy as np

    from martlet import engine
    from martlet.data.preprocess import Preprocess

    asked = json.loads(job)
    folder = Path(asked["folder"])
    size = Preprocess.from_json(json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))).size
    session = engine.get(asked["engine"]).open(folder, **asked["options"])
    for _ in range(RUNS):
        session(np.zeros((1, 3, *size), dtype=np.float32))
    print(process_peak_rss_bytes())


def process_peak_rss_bytes() -> int:
    """The most that this process held since it began, or since `forget_peak`.

    Linux's `ru_maxrss` won't do: it starts at what the parent held when it forked.
    """
    if sys.platform.startswith("linux"):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024  # in KiB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Lets `process_peak_rss_bytes` begin anew, on Linux; elsewhere a peak stays that of the whole process."""
    if sys.platform.startswith("linux"):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
