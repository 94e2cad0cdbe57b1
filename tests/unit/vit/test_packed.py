"""Packed images get the logits that timm gives each alone, with less padding than a padded batch, in static shapes."""

import numpy as np
import pytest
import timm
import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor

from martlet.core.errors import SourceError, UsageError
from martlet.data.packing import first_fit, padding_ratio
from martlet.vit.packed import PackedViT

SIZES = [(20, 12), (8, 16), (12, 12), (4, 24), (16, 16), (8, 8), (12, 20)]


def tiny(**settings: object) -> NaFlexVit:
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "reg_tokens": 2, "global_pool": "avg"}
    sizes |= {"fc_norm": True, "init_values": 0.5, "pos_embed_grid_size": (4, 4)}
    module = NaFlexVit(NaFlexVitCfg(**(sizes | settings)), num_classes=5).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def images(sizes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def run(packer: PackedViT, xs: list[Tensor], length: int, most: int, **settings: object) -> Tensor:
    packed = packer.pack(xs, length, most, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        return packed.logits(packer(*packed.inputs()))


@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 0, "fc_norm": False}, {"pos_embed": "factorized"}])
def test_packed_logits_are_the_unpacked(settings: dict[str, object]) -> None:
    model, xs = tiny(**settings), images(SIZES)
    found = run(PackedViT(model), xs, 40, 3)
    with torch.no_grad():
        expected = torch.cat([model(x[None]) for x in xs])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-2


def test_timms_own_packed_model() -> None:
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3, num_classes=7).eval()
    xs = images([(64, 48), (32, 80), (48, 48)])
    found = run(PackedViT(model), xs, 36, 4)
    with torch.no_grad():
        expected = torch.cat([model(x[None]) for x in xs])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_image_sees_only_itself() -> None:
    packer, xs = PackedViT(tiny()), images(SIZES[:3])
    alone = run(packer, xs[:1], 40, 3)
    other = run(packer, [xs[0], 5 * xs[1], xs[2]], 40, 3)
    torch.testing.assert_close(other[:1], alone, rtol=1e-5, atol=1e-5)
    packed = packer.pack(xs, 40, 3)
    with torch.no_grad():
        mixed = packer(packed.patches, packed.added, torch.ones_like(packed.images), packed.pool)
    assert (packed.logits(mixed)[0] - alone[0]).abs().max() > 1e-2  # without the blocks of the mask it isn't so


def test_packing_wastes_less_than_padding() -> None:
    """Images of 64 to 256 patches in all shapes: under a tenth is padding, in a padded batch over three tenths."""
    rng = np.random.default_rng(0)
    lengths = [int(rng.integers(64, 257)) for _ in range(64)]
    sequences = first_fit(lengths, 1024)
    assert padding_ratio(lengths, len(sequences), 1024) < 0.1
    assert padding_ratio(lengths, len(lengths), max(lengths)) > 0.3
    assert sorted(i for members in sequences for i in members) == [*range(64)]
    assert all(sum(lengths[i] for i in members) <= 1024 for members in sequences)


def test_first_fit_takes_the_first_with_room() -> None:
    assert first_fit([5, 6, 4, 2, 3], 10) == [[0, 2], [1, 3], [4]]
    assert first_fit([1, 1, 1], 10, most=2) == [[0, 1], [2]]
    assert first_fit([], 10) == []
    with pytest.raises(UsageError, match="number 1 has 11 tokens, and a sequence 10"):
        first_fit([3, 11], 10)


def test_dropped_patches_leave_room_and_keep_their_places() -> None:
    packer, xs = PackedViT(tiny()), images([(16, 16)] * 4)
    whole, half = packer.pack(xs, 36, 4), packer.pack(xs, 36, 4, drop_ratio=0.5)
    assert len(whole.patches) == 2
    assert len(half.patches) == 2 - 1 + (4 * (8 + 2) > 36)
    sequence, number = half.places[0]
    mine = half.pool[sequence, number] != 0
    assert mine.sum() == 8
    kept = half.patches[sequence, mine]
    at = [int((whole.patches[0] == row).all(-1).nonzero()[0]) for row in kept]
    assert at == sorted(at)
    torch.testing.assert_close(half.added[sequence, mine], whole.added[0, at])
    again = packer.pack(xs, 36, 4, drop_ratio=0.5)
    assert torch.equal(again.patches, half.patches)
    assert not torch.equal(packer.pack(xs, 36, 4, drop_ratio=0.5, seed=1).patches, half.patches)
    assert torch.equal(packer.pack(xs, 36, 4, drop_ratio=0.0).patches, whole.patches)


def test_shapes_are_static_and_an_export_serves_other_images() -> None:
    packer = PackedViT(tiny())
    first = packer.pack(images(SIZES), 40, 3, sequences=5)
    other = packer.pack(images(SIZES[::-1][:4]), 40, 3, sequences=5)
    assert [x.shape for x in first.inputs()] == [x.shape for x in other.inputs()]
    graph = torch.export.export(packer, first.inputs(), strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(graph(*other.inputs()), packer(*other.inputs()), rtol=1e-4, atol=1e-4)
        assert other.logits(graph(*other.inputs())).shape == (4, 5)


def test_bad_input() -> None:
    packer = PackedViT(tiny())
    with pytest.raises(UsageError, match="image 0 is 10 × 12; its sides must be multiples of 4 and 4"):
        packer.pack(images([(10, 12)]), 40, 3)
    with pytest.raises(UsageError, match="number 0 has 102 tokens, and a sequence 40"):
        packer.pack(images([(40, 40)]), 40, 3)
    with pytest.raises(UsageError, match="7 images take 3 sequences of 40 tokens, and there are 2"):
        packer.pack(images(SIZES), 40, 3, sequences=2)
    with pytest.raises(UsageError, match="drop_ratio is 1"):
        packer.pack(images(SIZES), 40, 3, drop_ratio=1)
    with pytest.raises(UsageError, match="no images"):
        packer.pack([], 40, 3)
    with pytest.raises(SourceError, match=r"a class token and a head that pools by 'token'"):
        PackedViT(tiny(class_token=True, global_pool="token"))
    with pytest.raises(SourceError, match="rotary positions"):
        PackedViT(tiny(rope_type="axial"))
