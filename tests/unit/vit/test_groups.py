"""What became of each patch, against reductions that are known by hand."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from martlet.core.model import Model
from martlet.data.preprocess import Preprocess
from martlet.functional.tokens import Reduction
from martlet.techniques.tokens.evit import EViT
from martlet.techniques.tokens.expedit import Expedit
from martlet.techniques.tokens.mctf import MCTF
from martlet.techniques.tokens.skipvit import SkipViT
from martlet.techniques.tokens.tome import ToMe
from martlet.techniques.tokens.tps import TPS
from martlet.vit import view
from martlet.vit.groups import groups
from martlet.vit.tokens import Decision, TokenRun, Tokens, install_, patches_of


def model(**kwargs: object) -> Model:
    sizes = {"img_size": (24, 16), "patch_size": 8, "embed_dim": 12, "depth": 5, "num_heads": 3, "num_classes": 5}
    torch.manual_seed(2)
    module = VisionTransformer(**(sizes | kwargs)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return Model(name="vit", module=module, preprocess=Preprocess(size=(24, 16)), num_classes=5, origin={})


def images() -> Tensor:
    return torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(3))


def fixed(*parts: list[int], num_tokens: int):
    """A reduction of which each token left is made of the tokens named."""
    shares = torch.zeros(1, len(parts), num_tokens)
    for i, part in enumerate(parts):
        shares[:, i, part] = 1

    def decide(tokens: Tokens) -> Decision:
        return Decision(Reduction(range(num_tokens), shares.expand(tokens.x.shape[0], -1, -1)))

    return decide


def test_patches_are_followed_through_two_blocks() -> None:
    """Of the class token 0 and patches 1 to 6: 1 and 4 become one, 6 goes; then that one takes 3."""
    chosen = model()
    vit = view(chosen.module)
    decide = {
        0: fixed([0], [1, 4], [2], [3], [5], num_tokens=7),
        2: fixed([0], [2], [1, 3], [4], num_tokens=5),
    }
    install_(TokenRun(vit.blocks[1:], patches_of(vit, 7), decide, num_read=1))
    first, second = groups(chosen, images())
    assert (first.block, first.num_tokens, first.grid) == ("blocks.1", 4, (3, 2))
    assert first.of.tolist() == [[0, 1, 2, 0, 3, -1]] * 2
    assert (second.block, second.num_tokens) == ("blocks.3", 3)
    assert second.of.tolist() == [[1, 0, 1, 1, 2, -1]] * 2


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize(
    "technique",
    [
        ToMe(r={1: 2, 2: 1}),
        TPS(r={1: 2, 2: 1}, informativeness=0.0),
        MCTF(r={1: 2, 2: 1}),
        EViT(r={1: 2, 2: 1}),
        Expedit(clusters=[2, 2], alpha=1),
    ],
)
def test_every_technique_can_be_followed(technique, kwargs) -> None:
    if "class_token" in kwargs and technique.name == "evit":
        pytest.skip("asks the class token")
    chosen = model(**kwargs)
    with torch.no_grad():
        expected = chosen.module(images())
    technique.apply_(chosen, None)
    found = groups(chosen, images())
    assert [each.block for each in found] == (["blocks.1"] if technique.name == "expedit" else ["blocks.1", "blocks.2"])
    left = [4] if technique.name == "expedit" else [4, 3]
    assert [each.num_tokens for each in found] == left
    for each in found:
        assert each.of.shape == (2, 6)
        assert all(0 <= token < each.num_tokens for token in each.of.flatten().tolist())
        assert all(len(set(row)) <= each.num_tokens for row in each.of.tolist())
    with torch.no_grad():
        assert not torch.equal(chosen.module(images()), expected)  # the model stays as it was: reduced


def test_patches_that_go_around_are_dropped_for_as_long_as_they_are_gone() -> None:
    chosen = model()
    SkipViT(r={0: 2, 1: 1}, back=3).apply_(chosen, None)  # type: ignore[arg-type]
    first, second = groups(chosen, images())
    assert [each.num_tokens for each in (first, second)] == [4, 3]
    for each, gone in ((first, 2), (second, 3)):
        for row in each.of.tolist():
            assert row.count(-1) == gone
            assert sorted(set(row) - {-1}) == [*range(6 - gone)]
    assert ((first.of >= 0) | (second.of < 0)).all()


def test_a_model_with_all_tokens_has_none() -> None:
    assert groups(model(), images()) == []
