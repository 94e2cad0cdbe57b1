"""The picture of patches, on images that are flat where patches are, so that its colors are known by hand."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from martlet import job
from martlet.core import store
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.report import Patches
from martlet.data import open_images
from martlet.data.preprocess import Preprocess
from martlet.measure.patches import patches
from martlet.report.patches import DROPPED, paint
from martlet.techniques.tokens.readout import Readout
from martlet.techniques.tokens.tome import ToMe

COLORS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (190, 190, 40), (40, 190, 190), (120, 120, 120)]
GRID = (2, 3)


def board(colors: list[tuple[int, int, int]], cell: int = 16) -> Image.Image:
    return Image.fromarray(np.array(colors, np.uint8).reshape(*GRID, 3).repeat(cell, 0).repeat(cell, 1))


def jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode()


def colors_of(jpeg_base64: str) -> np.ndarray:
    """The middle of each cell."""
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg_base64)))).astype(int)
    height, width = image.shape[0] // GRID[0], image.shape[1] // GRID[1]
    return image[height // 2 :: height, width // 2 :: width].reshape(-1, 3)


def test_merged_patches_take_their_mean_and_dropped_ones_are_dark() -> None:
    groups = [0, 1, 2, 0, -1, 1]
    picture: Patches = {
        "image": "board",
        "jpeg_base64": jpeg(board(COLORS)),
        "grid": [*GRID],
        "blocks": [{"block": "blocks.3", "num_tokens": 3, "groups": groups}],
    }
    [painted] = paint(picture)
    assert (painted.block, painted.kept, painted.merged, painted.tokens, painted.dropped) == ("blocks.3", 1, 4, 2, 1)
    assert painted.text == "of 6 patches, 1 kept, 4 merged into 2, 1 dropped"
    red, green = np.mean([COLORS[0], COLORS[3]], 0), np.mean([COLORS[1], COLORS[5]], 0)
    expected = np.array([red, green, COLORS[2], red, DROPPED, green])
    assert np.abs(colors_of(painted.jpeg_base64) - expected).max() < 8
    kept = dict(picture, blocks=[{"block": "blocks.3", "num_tokens": 6, "groups": [*range(6)]}])
    assert np.abs(colors_of(paint(kept)[0].jpeg_base64) - np.array(COLORS)).max() < 8  # type: ignore[arg-type]


def test_patches_that_are_alike_are_painted_as_one() -> None:
    """Without places, patches of one color are one to the model: these merge, and the others stay."""
    torch.manual_seed(1)
    module = VisionTransformer(img_size=(32, 48), patch_size=16, embed_dim=24, depth=3, num_heads=3, num_classes=5)  # type: ignore[arg-type]
    with torch.no_grad():
        module.pos_embed.zero_()
    model = Model(
        name="vit", module=module.eval(), preprocess=Preprocess(size=(32, 48), resize=None), num_classes=5, origin={}
    )
    alike = [COLORS[0], COLORS[0], COLORS[2], COLORS[3], COLORS[1], COLORS[1]]
    test = open_images([board(alike), board(COLORS)])
    assert patches(model, test) == []
    ToMe(r={1: 2}).apply_(model, None)  # type: ignore[arg-type]
    first, second = patches(model, test)
    assert first["grid"] == [*GRID]
    [block] = first["blocks"]
    groups = block["groups"]
    assert (block["block"], block["num_tokens"]) == ("blocks.1", 4)
    assert groups[0] == groups[1]
    assert groups[4] == groups[5]
    assert len(set(groups)) == 4
    assert np.abs(colors_of(first["jpeg_base64"]) - np.array(alike)).max() < 8
    assert len(set(second["blocks"][0]["groups"])) == 4
    [painted] = paint(first)
    assert painted.text == "of 6 patches, 2 kept, 4 merged into 2"


def test_a_job_shows_the_patches_to_whoever_reads_its_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is measured on engines is left out: only what was done to the model is asked."""
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(job.Duel, "measure", lambda *_: {"fidelity": {"n_images": 8}})
    monkeypatch.setattr(job, "gate", lambda *_: {"passed": True, "reasons": [], "judged": []})
    monkeypatch.setattr(store, "write_report", lambda _, document: written.append(document))
    digits = open_images("martlet:digits")
    for recipe in (ToMe(r={1: 6, 2: 3}), Readout()):
        job.compress(
            "martlet:digit_vit",
            images=digits,
            recipe=Recipe((recipe,)),
            engine="torch",
            out=tmp_path / recipe.name,
        )
    reduced, whole = written
    assert [[block["num_tokens"] for block in picture["blocks"]] for picture in reduced["patches"]] == [
        [43, 40]
    ] * 4  # of 49
    assert "patches" not in whole
