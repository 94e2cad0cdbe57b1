"""benchmarks/small_models.py: the weights that are kept are those of the results, and what isn't there is told."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
small_models = pytest.importorskip("small_models")
cifar = pytest.importorskip("setups.cifar")

from martlet.core.errors import UsageError  # noqa: E402
from martlet.data import open_images  # noqa: E402

ROWS = {row["name"]: row for row in json.loads((ROOT / "results" / "small_models.json").read_text())["rows"]}
SEEN = 400


@pytest.mark.parametrize("name", sorted(file.stem for file in small_models.KEPT.glob("*.safetensors")))
def test_kept_weights_are_as_good_as_the_results_say(name: str, assets: Path, tmp_path: Path) -> None:
    model, row = small_models.load(name, tmp_path), ROWS[name]
    assert model.num_classes == small_models.CLASSES[row["data"]]
    x, labels = cifar.read(open_images(assets / "data" / row["data"] / "test.parquet").sample(SEEN, 0), model)
    top1_pct = 100 * float((cifar.logits(model, x).argmax(1) == labels).float().mean())
    assert top1_pct == pytest.approx(row["top1_pct"], abs=7)  # three standard deviations


def test_what_is_not_there_is_told_with_what_to_type(tmp_path: Path) -> None:
    said = r"vit_tiny_200\.safetensors isn't there; python benchmarks/small_models\.py vit_tiny_200"
    with pytest.raises(UsageError, match=said):
        small_models.load("vit_tiny_200", tmp_path)
