"""Several processes share each batch, and learn what one would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = "import sys; from martlet.cli import main; sys.exit(main())"
ARGUMENTS = [
    "train", "timm:vit_tiny_patch16_224", "--model-kwargs", "depth=1,img_size=16,patch_size=8,embed_dim=48,num_heads=3",
    "--num-classes", "10", "--image-size", "16", "--images", "martlet:digits-train", "--epochs", "2",
]  # fmt: skip


@pytest.mark.slow
def test_two_processes_reach_the_loss_of_one(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(CODE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    losses, processes = [], []
    for name, start in (("one", [sys.executable]), ("two", launch)):
        out = tmp_path / name
        subprocess.run([*start, script, *ARGUMENTS, "--out", out], check=True, capture_output=True, timeout=280)
        [its] = json.loads((out / "training.json").read_text())["passes"]
        losses.append([loss for _, loss, _ in its["training"]["held_back"]])
        processes.append(its["training"]["processes"])
        assert not (tmp_path / f".{name}.resume").exists()
    assert processes == [1, 2]
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
