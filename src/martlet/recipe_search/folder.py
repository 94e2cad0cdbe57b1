"""A search's folder: what was asked, what was measured so far, the models themselves, and the best of them.

job.json        what the search is of; another job is refused
study.db        Optuna's record of what was drawn
screened/ measured/ final/ rounds/ fronts/    one JSON file for each thing that was found out
trained/        what was trained, for every recipe that has it alike
candidates/     compressed models, each an artifact without a report
winner/         the best so far, as an artifact
search.json     everything as one document; report.html shows it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from martlet.core import store
from martlet.core.errors import ArtifactError, UsageError
from martlet.recipe_search.record import write

VERSION = 2
JOB, DOCUMENT, PAGE, WINNER = "job.json", "search.json", "report.html", "winner"
TRAINED = "trained"


@dataclass(frozen=True)
class Folder:
    path: Path

    @classmethod
    def open(cls, path: Path, job: dict[str, Any], overwrite: bool) -> Folder:
        """The folder of this job, made if it isn't there.

        Raises:
            UsageError: it is of another job, or holds something else. ArtifactError: it is damaged.
        """
        job = json.loads(json.dumps(job))
        if overwrite and (path / JOB).is_file():
            shutil.rmtree(path)
        if not (path / JOB).is_file():
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UsageError(f"{path} exists and is no search; choose another --out")
            store.check_free(path, overwrite=False)
            path.mkdir(parents=True, exist_ok=True)
            write(path / JOB, json.dumps({"martlet_search": VERSION, "job": job}, indent=1) + "\n")
            return cls(path)
        found = read_job(path)
        other = next((key for key in job if found.get(key) != job[key]), None)
        if other is not None:
            raise UsageError(
                f"{path} is a search with another {other} ({_short(found.get(other))}, now {_short(job[other])}); add "
                "--overwrite to begin anew, or choose another --out"
            )
        return cls(path)

    def get(self, kind: str, key: str) -> Any:
        """What is on record, or None.

        Raises:
            ArtifactError: it can't be read.
        """
        path = self.path / kind / f"{key}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); delete it, and it is measured again") from None

    def put(self, kind: str, key: str, value: Any) -> None:
        write(self.path / kind / f"{key}.json", json.dumps(value, indent=1, allow_nan=False) + "\n")

    def all(self, kind: str) -> Iterator[tuple[str, Any]]:
        """Everything of a kind, by key."""
        for path in sorted((self.path / kind).glob("*.json")):
            yield path.stem, self.get(kind, path.stem)

    @property
    def candidates(self) -> Path:
        return self.path / "candidates"

    @property
    def winner(self) -> Path:
        return self.path / WINNER

    def write_winner(self, candidate: Path) -> None:
        """Makes a copy of a candidate's artifact the winner; the old one stays until it is whole."""
        with store.writing(self.winner, overwrite=True) as folder:
            shutil.copytree(candidate, folder, dirs_exist_ok=True, copy_function=_link)


def read_job(path: Path) -> dict[str, Any]:
    """What a search's folder is of.

    Raises:
        UsageError: it is none. ArtifactError: it is damaged, or of another version.
    """
    try:
        data = json.loads((path / JOB).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is no search: it has no {JOB}; `martlet search … --out` makes one") from None
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict) or data.get("martlet_search") != VERSION or not isinstance(data.get("job"), dict):
        raise ArtifactError(f"{path / JOB} is damaged or of another version; add --overwrite, or choose another --out")
    return data["job"]


@cache
def code_digest() -> str:
    """16 hex digits that change with any line of the package."""
    root, found = Path(__file__).parents[1], sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _link(source: str, target: str) -> None:
    """The same file under another name where the disk can, else a copy; an artifact's files are never written again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
