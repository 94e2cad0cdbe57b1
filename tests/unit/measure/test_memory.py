import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from martlet import engine as engines
from martlet.core.errors import EngineError
from martlet.core.model import Model
from martlet.data.preprocess import Preprocess
from martlet.measure.memory import peak_rss_bytes


class Wide(nn.Module):
    """`mb` megabytes of weights that every image needs."""

    def __init__(self, mb: int) -> None:
        super().__init__()
        self.fc = nn.Linear(192, mb * 1_000_000 // (4 * 192), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def write(folder, mb):
    folder.mkdir()
    model = Model(name="wide", module=Wide(mb), preprocess=Preprocess(size=(8, 8)), num_classes=1, origin={})
    engines.get("openvino").lower(model, folder)
    (folder / "preprocess.json").write_text(json.dumps(model.preprocess.to_json()))
    return folder


def test_more_weights_take_more_memory(tmp_path):
    small, large = (peak_rss_bytes("openvino", write(tmp_path / str(mb), mb), threads=1) for mb in (1, 150))
    assert small is not None
    assert large is not None
    assert 20e6 < small < 500e6  # an interpreter and a library, without torch
    assert large - small > 140e6


def test_failure_is_one_line(tmp_path):
    folder = write(tmp_path / "m", 1)
    (folder / "model.xml").unlink()
    with pytest.raises(
        EngineError, match=r"openvino failed while its memory was measured: .*has no model\.xml"
    ) as caught:
        peak_rss_bytes("openvino", folder)
    assert "\n" not in str(caught.value)


def test_what_the_parent_holds_does_not_count(tmp_path):
    folder = write(tmp_path / "m", 1)
    before = peak_rss_bytes("openvino", folder, threads=1)
    held = np.ones(500_000_000, dtype=np.uint8)
    after = peak_rss_bytes("openvino", folder, threads=1)
    assert before is not None
    assert after is not None
    assert abs(after - before) < 0.2 * held.nbytes


def test_measuring_needs_no_torch():
    modules = ", ".join(f"martlet.measure.{name}" for name in ("memory", "latency", "fidelity", "coverage", "accuracy"))
    code = f"import sys, {modules}; print(*({{'torch', 'timm', 'onnx', 'openvino'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
