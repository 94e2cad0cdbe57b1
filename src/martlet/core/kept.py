"""Work that a stopped run leaves behind, so that the same run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet.core.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """A folder of steps done, each a file by the name of all that it depends on. Made when the first is saved."""

    folder: Path

    @classmethod
    def beside(cls, out: Path) -> Kept:
        """Where the run that will write to `out` keeps its work."""
        return cls(out.with_name(f".{out.name}.resume"))

    def save(self, key: str, tensors: Mapping[str, Tensor], data: Any) -> None:
        """Writes beside, then renames. data: anything that JSON holds."""
        import torch
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{key}.safetensors"
        partial = file.with_suffix(f".{os.getpid()}.partial")  # two processes may be at the same step
        # copies, as no two names may share memory; in the order of the axes, which convolutions' weights may not be
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(copies, partial, metadata={"data": json.dumps(data)})
        partial.replace(file)

    def load(self, key: str) -> tuple[dict[str, Tensor], Any] | None:
        """What was saved, or None.

        Raises:
            ArtifactError: it is damaged.
        """
        from safetensors import SafetensorError, safe_open

        file = self.folder / f"{key}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                data = json.loads(opened.metadata()["data"])
                return {name: opened.get_tensor(name) for name in opened.keys()}, data  # noqa: SIM118 - no mapping
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{file} is damaged; delete {self.folder} to begin anew") from error


def digest(parts: Iterable[Tensor | str]) -> str:
    """32 hex digits that change with any tensor's values, type or shape, and with any text."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode() + b"\0")
        else:
            found.update(f"{part.dtype}{tuple(part.shape)}".encode() + part.contiguous().numpy().tobytes())
    return found.hexdigest()[:32]
