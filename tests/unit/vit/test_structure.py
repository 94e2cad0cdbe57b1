"""Cuts of every library's models: what is cut is gone, what isn't stays to the bit, and the sizes can be restored."""

import copy

import pytest
import torch
from test_view import MODELS, build, image_size
from torch import Tensor, nn

from martlet.core.errors import RecipeError
from martlet.functional.structure.heads import selection
from martlet.nn.attention import ShapedAttention, relative_index
from martlet.vit import view
from martlet.vit.repair import Cut, cut_, cut_and_repair_
from martlet.vit.structure import (
    BlockShape,
    check_attention,
    cut_width_,
    put_attention_,
    read_attention,
    read_mlp,
    record_of,
    remove_block_,
    restore_structure_,
    shape_of,
    write_attention_,
    write_mlp_,
)

NO_LAYER = "torchvision_swin"
"""Its windows are inside its attention, so nothing takes its place."""


class Images:
    num_images = 6

    def __init__(self, name: str) -> None:
        self.size = image_size(name)

    def __iter__(self):
        generator = torch.Generator().manual_seed(2)
        for _ in range(2):
            yield torch.randn(3, 3, *self.size, dtype=torch.float64, generator=generator)


class Logits(nn.Module):
    """What `Model.module` is to the techniques: images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        out = self.model(images)
        return out if isinstance(out, Tensor) else out.logits


def outputs(name: str, module: nn.Module) -> Tensor:
    with torch.no_grad():
        out = module(
            torch.randn(2, 3, *image_size(name), dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        )
    return out if isinstance(out, Tensor) else out.logits


def smaller(module: nn.Module, number: int) -> Cut:
    """Half of every size that can be cut."""
    block = view(module).blocks[number]
    now, attention = shape_of(block), block.attention
    free = isinstance(attention.module, ShapedAttention) or not type(attention.module).__module__.startswith(
        "torchvision.models.swin"
    )
    qk = now.qk_dim // 2 if free and attention.query_norm is None else now.qk_dim
    v = now.v_dim // 2 if free and attention.norm is None else now.v_dim
    return Cut(BlockShape(now.num_heads, qk, v, now.hidden // 2))


@pytest.mark.parametrize("name", [name for name in MODELS if name != NO_LAYER])
def test_a_layer_of_martlets_computes_what_the_librarys_did(name: str) -> None:
    module = build(name)
    expected, before = outputs(name, module), [shape_of(block) for block in view(module).blocks]
    for block in view(module).blocks:
        write_attention_(view(module), block, read_attention(block.attention))
        write_mlp_(block.mlp, read_mlp(block.mlp))
    torch.testing.assert_close(outputs(name, module), expected, rtol=1e-9, atol=1e-9)
    blocks = view(module).blocks
    assert [shape_of(block) for block in blocks] == before
    assert all(isinstance(block.attention.module, ShapedAttention) for block in blocks)
    with torch.no_grad():
        blocks[0].attention.proj.weight.mul_(1.5)
    assert not torch.allclose(outputs(name, module), expected, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_cut_is_gone_and_the_record_restores_it_in_other_weights(name: str) -> None:
    module, other = build(name), build(name)
    before = view(module)
    cuts = {number: smaller(module, number) for number in (1, 2)}
    cut_and_repair_(Logits(module), cuts, Images(name))
    after = view(module)
    assert {number: shape_of(after.blocks[number]) for number in cuts} == {n: cut.shape for n, cut in cuts.items()}
    record = record_of(before, [*range(len(before.blocks))], after)
    restore_structure_(other, record)
    other.load_state_dict(module.state_dict())
    assert torch.equal(outputs(name, other), outputs(name, module))
    again = {number: smaller(module, number) for number in cuts}  # half of the half
    cut_and_repair_(Logits(module), again, Images(name))
    assert {number: shape_of(view(module).blocks[number]) for number in cuts} == {n: c.shape for n, c in again.items()}


@pytest.mark.parametrize("name", ["timm_registers", "timm_post_norm", "hf_swin"])
def test_a_repair_of_what_lost_nothing_changes_nothing(name: str) -> None:
    module = build(name)
    expected, now = outputs(name, module), shape_of(view(module).blocks[1])
    cut_and_repair_(Logits(module), {1: Cut(now)}, Images(name))
    torch.testing.assert_close(outputs(name, module), expected, rtol=1e-6, atol=1e-6)


def test_a_repair_makes_up_for_much_of_a_cut() -> None:
    module = build("timm_one_head")
    expected, kept = outputs("timm_one_head", module), torch.arange(24)
    cut = Cut(BlockShape(1, 12, 12, 24), hidden=kept)
    bare, repaired = copy.deepcopy(module), copy.deepcopy(module)
    cut_(bare, {1: cut})
    cut_and_repair_(Logits(repaired), {1: cut}, Images("timm_one_head"))
    lost = [(outputs("timm_one_head", each) - expected).norm() for each in (bare, repaired)]
    assert lost[1] < 0.7 * lost[0]


@pytest.mark.parametrize("name", ["timm_gate_last", "hf_dinov2_registers", "torchvision_vit"])
def test_a_unit_that_nothing_reads_can_go_and_heads_too(name: str) -> None:
    module = build(name)
    block = view(module).blocks[1]
    shape = shape_of(block)
    with torch.no_grad():
        block.mlp.fc2.weight[:, 3:5] = 0
        block.attention.proj.weight[:, : shape.v_dim] = 0  # of the first head
    expected = outputs(name, module)
    hidden = torch.tensor([i for i in range(shape.hidden) if i not in (3, 4)])
    heads = torch.arange(1, shape.num_heads)
    left = BlockShape(shape.num_heads - 1, shape.qk_dim, shape.v_dim, shape.hidden - 2)
    cut_(module, {1: Cut(left, heads=heads, hidden=hidden)})
    torch.testing.assert_close(outputs(name, module), expected, rtol=1e-9, atol=1e-9)
    assert shape_of(view(module).blocks[1]) == left


@pytest.mark.parametrize("name", MODELS)
def test_a_block_that_adds_nothing_can_go(name: str) -> None:
    module = build(name)
    number = 2 if name == "torchvision_vit" else 1
    before = view(module)
    block = before.blocks[number]
    with torch.no_grad():
        last = [block.norm1, block.norm2] if block.post_norm else [block.attention.proj, block.mlp.fc2]
        for each in last:
            for parameter in each.module.parameters(recurse=False):
                parameter.zero_()
        if name == "timm_scale_norms":
            block.attention.proj.module.bias.zero_()  # type: ignore[operator]
    expected = outputs(name, module)
    if sum(other.stage == block.stage for other in before.blocks) == 1:
        with pytest.raises(RecipeError, match=rf"{block.name} is the only block of its stage"):
            remove_block_(before, number)
        return
    remove_block_(before, number)
    torch.testing.assert_close(outputs(name, module), expected, rtol=1e-9, atol=1e-9)
    record = record_of(before, [i for i in range(len(before.blocks)) if i != number], view(module))
    other = build(name)
    restore_structure_(other, record)
    other.load_state_dict(module.state_dict())
    assert torch.equal(outputs(name, other), outputs(name, module))


@pytest.mark.parametrize("name", [name for name in MODELS if "swin" not in name])
def test_the_width_can_be_cut_everywhere(name: str) -> None:
    module, other = build(name), build(name)
    before = view(module)
    kept = torch.arange(0, before.embed_dim, 2)
    cut_width_(before, kept)
    after = view(module)
    assert after.embed_dim == len(kept)
    assert outputs(name, module).shape == (2, 5)
    restore_structure_(other, record_of(before, [*range(len(before.blocks))], after))
    other.load_state_dict(module.state_dict())
    assert torch.equal(outputs(name, other), outputs(name, module))


def test_a_width_of_which_all_stays_changes_nothing() -> None:
    module = build("timm_registers")
    expected = outputs("timm_registers", module)
    cut_width_(view(module), torch.arange(12))
    torch.testing.assert_close(outputs("timm_registers", module), expected, rtol=1e-9, atol=1e-9)


def test_the_width_of_stages_is_refused_by_name() -> None:
    for name, at in (("timm_swin", "layers.0.blocks.0"), ("hf_swin", "swin.encoder.layers.0.blocks.0")):
        with pytest.raises(RecipeError, match=f"the width at {at} can't be cut"):
            cut_width_(view(build(name)), torch.arange(4))


@pytest.mark.parametrize(
    ("name", "what", "why"),
    [
        ("timm_registers", "qk", "normalized together"),
        ("timm_scale_norms", "v", "normalized as a whole"),
        ("timm_scale_norms", "heads", "normalized as a whole"),
        ("torchvision_swin", "qk", "inside its attention"),
    ],
)
def test_attention_that_has_no_such_cut_is_refused_by_name(name: str, what: str, why: str) -> None:
    vit = view(build(name))
    with pytest.raises(RecipeError, match=rf"^it can't cut .* at {vit.blocks[0].attention.name}.*{why}"):
        check_attention(vit, vit.blocks[0], "it", what)


def test_sizes_that_stay_stay_in_the_librarys_own_attention() -> None:
    module = build("hf_deit")
    block = view(module).blocks[0]
    put_attention_(view(module), block, read_attention(block.attention))
    assert view(module).blocks[0].attention.module is block.attention.module
    pick = selection(torch.tensor([[0, 1, 3]] * 3), 4)
    put_attention_(view(module), block, read_attention(block.attention).scores_by(pick, pick))
    assert isinstance(view(module).blocks[0].attention.module, ShapedAttention)
    assert shape_of(view(module).blocks[0]).qk_dim == 3


def test_positions_in_a_window_that_is_no_square() -> None:
    index = relative_index((2, 3))
    assert index.shape == (6, 6)
    assert index[0, 0] == index[5, 5] == 1 * 5 + 2  # no offset
    assert index[0, 5] == 0  # the query stands before the key in both directions
    assert index[5, 0] == 14
    assert len(index.unique()) == 15
