"""Blocks that are run one by one give what they give in the whole model."""

import copy
from typing import Any

import pytest
import torch
from test_structure import Logits
from test_view import MODELS, build, image_size

from martlet.vit import view
from martlet.vit.sensitivity import measured_losses
from martlet.vit.streams import First, Streams

NAMES = ["timm_registers", "timm_swin", "hf_deit", "hf_swin", "torchvision_vit", "torchvision_swin"]


class Images:
    num_images = 5

    def __init__(self, name: str) -> None:
        self.size = image_size(name)

    def __iter__(self):
        generator = torch.Generator().manual_seed(2)
        for count in (3, 2):
            yield torch.randn(count, 3, *self.size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_is_the_whole_model(name: str) -> None:
    module = Logits(build(name))
    blocks, seen = view(module).blocks, list[Any]()
    handles = [block.mlp.fc2.module.register_forward_hook(lambda _, __, y: seen.append(y)) for block in blocks]
    with torch.no_grad():
        logits = [module(images) for images in Images(name)]
    for handle in handles:
        handle.remove()
    streams = Streams(copy.deepcopy(module), Images(name))
    depth = len(blocks)
    for number in range(depth):
        fc2 = view(streams.module).blocks[number].mlp.fc2.module
        stopped = [found["y"] for found in streams.run({"y": (fc2, "out")})]
        assert streams.done == number
        again = list(streams.logits(2))
        kept = [found["y"] for found in streams.run({"y": (fc2, "out")}, keep=True)]
        for i in range(2):
            torch.testing.assert_close(kept[i], seen[i * depth + number])
            torch.testing.assert_close(stopped[i], kept[i])
            torch.testing.assert_close(again[i], logits[i])
    with torch.no_grad():
        torch.testing.assert_close(streams.module(next(iter(Images(name)))), logits[0])  # nothing stays behind


def test_all_models_of_the_view_are_among_those_asked() -> None:
    assert set(NAMES) < set(MODELS)


def test_the_first_images_come_in_whole_batches() -> None:
    for number, expected in ((1, 3), (3, 3), (4, 5), (9, 5)):
        first = First(Images("hf_deit"), number)
        assert first.num_images == sum(map(len, first)) == expected


def test_a_measured_loss_is_the_divergence_of_the_cut_model() -> None:
    module = Logits(build("hf_deit"))
    found = measured_losses(module, {(1, "v"): [3, 1], (2, "hidden"): [18, 4]}, Images("hf_deit"), 5)
    assert 0 <= found[1, "v"][3] < found[1, "v"][1]
    assert 0 <= found[2, "hidden"][18] < found[2, "hidden"][4]
    unread = Logits(build("hf_deit"))
    with torch.no_grad():
        view(unread).blocks[2].mlp.fc2.weight[:, :2] = 0
    found = measured_losses(unread, {(2, "hidden"): [18, 4]}, Images("hf_deit"), 5)
    assert found[2, "hidden"][18] == pytest.approx(0, abs=1e-6)
    assert found[2, "hidden"][4] > 1e-4
