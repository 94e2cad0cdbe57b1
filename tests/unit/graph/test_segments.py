"""Pieces of a graph: together they are the whole, and each has what it should."""

from itertools import pairwise

import pytest
import torch
from small_vits import MODELS, SIZE, traced
from timm.models.swin_transformer import SwinTransformer

from martlet.graph.segments import blocks, extract
from martlet.graph.sites import sites
from martlet.graph.trace import trace


def swin() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=32, patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(2, 4), window_size=4, num_classes=5
    )
    return trace(model.eval(), (32, 32))


@pytest.mark.parametrize("name", [*MODELS, "swin"])
@torch.no_grad()
def test_pieces_in_a_row_are_the_whole(name):
    whole = swin() if name == "swin" else traced(name)
    images = torch.randn(3, 3, *((32, 32) if name == "swin" else SIZE))  # another number than was traced with
    x = images
    pieces = blocks(whole)
    for piece in pieces:
        x = extract(whole, piece.input, piece.output)(x)
    expected = whole(images)
    torch.testing.assert_close(x, expected[0] if isinstance(expected, tuple) else expected, rtol=0, atol=0)
    assert [name for piece in pieces for name in piece.names] == [site.name for site in sites(whole)]
    assert len(pieces) > 2
    assert all(before.output is after.input for before, after in pairwise(pieces))


def test_an_attention_and_the_mlp_behind_it_are_one():
    pieces = blocks(traced("no class token"))
    assert [len(piece.names) for piece in pieces] == [1, 6, 6, 6, 1]
    assert pieces[2].names[0].startswith("blocks.1.attn.qkv")
    assert pieces[2].names[-1] == "blocks.1.mlp.fc2"


def test_a_swin_has_its_blocks_and_the_merging_between_stages():
    pieces = blocks(swin())
    assert [len(piece.names) for piece in pieces] == [1, 6, 6, 1, 6, 1]


def test_a_piece_shares_the_parameters_of_the_whole():
    whole = traced("class token")
    piece = blocks(whole)[1]
    part = extract(whole, piece.input, piece.output)
    with torch.no_grad():
        whole.get_parameter("blocks.0.mlp.fc2.bias").zero_()
    assert part.get_parameter("blocks.0.mlp.fc2.bias").abs().max() == 0
    assert "head.weight" not in dict(part.named_parameters())
