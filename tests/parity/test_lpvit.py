"""lpvit's losses are sums over single weights, and the blocks that go are those a sort by hand puts first."""

from typing import Any

import pytest
import torch

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.functional.structure.blocks import block_sums, choose_blocks, power_weight, spread_blocks
from martlet.source import load_model
from martlet.techniques.prune.lpvit import LPViT
from martlet.vit.budget import total_macs

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "mlp_ratio": 2.0}
BLOCK = 4


class Noise:
    num_images = 6

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(3, 3, 16, 16, generator=generator)


def model() -> Model:
    torch.manual_seed(0)
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=5, seed=3)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.normal_(0, 0.5)
    return found


def losses_by_hand(second: bool = True) -> list[list[float]]:
    """Of each block of fc2 (12, 24), weight by weight; as a fault, without the second order."""
    module, found = model().module.double(), [[0.0] * 6 for _ in range(3)]
    for images in Noise():
        module.zero_grad()
        logits = module(images.double())
        (sum(float_ * float_ for row in logits for float_ in row) / logits.numel()).backward()
        weight = module.blocks[0].mlp.fc2.weight  # type: ignore[index, union-attr]
        products = (weight * weight.grad).tolist()
        for p in range(3):
            for q in range(6):
                inside = [products[p * BLOCK + i][q * BLOCK + j] for i in range(BLOCK) for j in range(BLOCK)]
                found[p][q] += sum(x * x for x in inside) / weight.numel() + (sum(inside) ** 2 / 2 if second else 0.0)
    return found


@pytest.mark.parametrize("second", [True, pytest.param(False, id="a fault in the oracle")])
def test_losses_are_the_papers(second: bool) -> None:
    technique = LPViT(block=BLOCK)
    found = technique.losses(model(), Context(images=Noise()))[5]
    close = torch.allclose(found, torch.tensor(losses_by_hand(second), dtype=torch.float64), rtol=1e-3)
    assert close == second


def test_blocks_go_by_loss_less_power_for_each_mac() -> None:
    losses = [torch.tensor([[1.0, 5.0], [2.0, 8.0]]), torch.tensor([[3.0, 6.0]])]
    macs, powers = [1.0, 2.0], [1.0, 3.0]
    plain = choose_blocks(losses, macs, powers, 0.0, 4.0, 0.0)  # prices 1, 5, 2, 8 and 1.5, 3
    assert [each.int().tolist() for each in plain] == [[[0, 1], [0, 1]], [[0, 1]]]
    green = choose_blocks(losses, macs, powers, 2.0, 4.0, 0.0)  # prices -1, 3, 0, 6 and -1.5, 0
    assert [each.int().tolist() for each in green] == [[[0, 1], [0, 1]], [[0, 1]]]
    green = choose_blocks(losses, macs, powers, 3.0, 4.0, 0.0)  # prices -2, 2, -1, 5 and -3, -1.5
    assert [each.int().tolist() for each in green] == [[[0, 1], [1, 1]], [[0, 0]]]
    held = choose_blocks(losses, macs, powers, 3.0, 4.0, 0.5)
    assert [each.int().tolist() for each in held] == [[[0, 1], [0, 1]], [[0, 1]]]
    assert power_weight(losses, powers) == pytest.approx((8 + 6) / 2 / 2)


def test_blocks_are_whole() -> None:
    x = torch.arange(24.0).view(4, 6)
    sums = block_sums(x, 2)
    assert sums.tolist() == [[14, 22, 30], [62, 70, 78]]
    assert spread_blocks(sums, 2).shape == x.shape
    assert spread_blocks(sums, 2)[3, 5] == 78


@pytest.mark.parametrize("power", [True, False])
def test_zero_blocks_stand_for_the_macs_that_were_asked_for(power: bool) -> None:
    whole = model()
    technique = LPViT(prune_ratio=0.15, block=BLOCK, power=power)
    found: Any = pipeline.run(whole, Recipe((technique,)), Context(images=Noise())).module
    block, zero = found.blocks[0], 0
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        empty = block_sums(linear.weight != 0, BLOCK) == 0
        assert torch.equal(spread_blocks(empty, BLOCK), linear.weight == 0)
        assert 1 - empty.float().mean() >= 0.2
        zero += int(empty.sum())
    wanted = 0.15 * total_macs(whole) / (5 * BLOCK**2)
    assert wanted <= zero < wanted + 1


def test_none_zero_is_the_original_to_the_bit() -> None:
    images = torch.randn(2, 3, 16, 16)
    same = pipeline.run(model(), Recipe((LPViT(prune_ratio=0.0, block=BLOCK),)), Context(images=Noise()))
    assert torch.equal(same.module(images), model().module(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 5}, r"lpvit: blocks\.0\.attn\.qkv has \(12, 12\) weights, which blocks of 5 don't fill"),
        ({"block": 4, "prune_ratio": 0.9}, r"prune_ratio 0\.9 would empty layers such as blocks\.0\.attn\.qkv"),
        ({"prune_ratio": 1.0}, "prune_ratio is from 0 to less than 1"),
        ({"block": 0}, "block is at least 1"),
    ],
)
def test_what_cant_be_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pipeline.run(model(), Recipe((LPViT(**settings),)), Context(images=Noise()))  # type: ignore[arg-type]
