"""What `benchmarks/prune.py` holds papers' claims against is cut as much as what they claim."""

import sys
from itertools import groupby
from pathlib import Path

import pytest

from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.data import open_images
from martlet.data.calibration import Calibration
from martlet.measure.size import params
from martlet.source import load_model
from martlet.vit.budget import total_macs
from martlet.vit.view import view

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]
prune_ways = pytest.importorskip("setups.prune_ways")

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


def tiny() -> tuple[Model, Context]:
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, preprocess={"size": (32, 32)})
    images = Calibration(open_images("martlet:digits"), model.preprocess, n=16, seed=0)
    return model, Context(images=images, seed=0)


def test_half_of_attention_goes_either_way() -> None:
    model, context = tiny()
    whole = 4 * (4 * 48 * 48 + 4 * 48)
    for name, cut in prune_ways.halves_of_attention(model, context):
        removed = (params(model.module) - params(cut.module)) / whole
        assert 0.45 < removed < 0.58, name


def test_as_many_blocks_are_zero_and_not_the_same() -> None:
    model, context = tiny()
    cut = dict(prune_ways.blocks_of_zeros(model, context))
    zeros = {
        name: [(map_.weight == 0).flatten().tolist() for block in view(m.module).blocks for map_ in (block.mlp.fc1,)]
        for name, m in cut.items()
    }
    whole = {name: sum(int((p == 0).sum()) for p in m.module.parameters()) for name, m in cut.items()}
    assert max(whole.values()) - min(whole.values()) <= 16 * 16
    assert zeros["lpvit"] != zeros["magnitude of blocks"]


def test_drawn_paths_are_others_of_equal_macs() -> None:
    model, context = tiny()
    found = list(prune_ways.fewer_paths(model, context, gone=2, draws=3))
    macs = {total_macs(cut) for name, cut in found if "not weighed" in name}
    assert len(macs) == 1
    assert macs.pop() < total_macs(model)
    left = [sorted(name for name, _ in cut.module.named_parameters()) for name, cut in found if "drawn" in name]
    assert len([*groupby(left)]) > 1
