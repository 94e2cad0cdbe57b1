"""skipvit is the paper's, in whole models, on an oracle that lets one token at a time go around blocks."""

from collections.abc import Mapping

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from token_oracle import Choose, Token, images, logits_with, through, vit
from torch import Tensor

from martlet.techniques.tokens.skipvit import SkipViT

SCHEDULE, BACK = {1: 4, 2: 5}, 4
MODELS = [{}, {"reg_tokens": 2, "qk_norm": True}, {"global_pool": "avg"}]


def leaving(r: int, prefix: int, aside: list[Token], best: bool) -> Choose:
    """Puts r tokens aside; the ones that are looked at least, if the `best` stay."""

    def choose(
        tokens: list[Token], keys: list[Tensor], by_head: list[list[float]], before: list[Tensor]
    ) -> list[Token]:
        order = sorted(range(prefix, len(tokens)), key=lambda t: sum(by_head[t]), reverse=best)
        aside.extend(tokens[t] for t in order[len(order) - r :])
        return [tokens[t] for t in (*range(prefix), *order[: len(order) - r])]

    return choose


def logits_by_hand(
    module: VisionTransformer, schedule: Mapping[int, int], back: int, comes_back: bool = True, best: bool = True
) -> Tensor:
    out, prefix = [], module.num_prefix_tokens
    with torch.no_grad():
        for image in module.norm_pre(module._pos_embed(module.patch_embed(images()))):
            tokens: list[Token] = [(1.0, x) for x in image]
            aside: list[Token] = []
            for i, block in enumerate(module.blocks):
                if i == back and comes_back:
                    tokens = tokens + aside
                tokens = through(
                    block, tokens, leaving(schedule[i], prefix, aside, best) if i in schedule else None, False
                )
            patches = torch.stack([x for _, x in tokens[prefix:]])
            pooled = module.norm(tokens[0][1]) if module.global_pool == "token" else module.fc_norm(patches.mean(0))
            out.append(module.head(pooled))
    return torch.stack(out)


@pytest.mark.parametrize("kwargs", MODELS)
def test_skipvit_is_the_papers(kwargs: dict[str, object]) -> None:
    module = vit(**kwargs)
    for back in (BACK, 3):
        found = logits_with(module, SkipViT(r=SCHEDULE, back=None if back == BACK else back))
        torch.testing.assert_close(found, logits_by_hand(module, SCHEDULE, back), rtol=1e-9, atol=1e-9)


def test_this_can_fail() -> None:
    module = vit()
    found = logits_with(module, SkipViT(r=SCHEDULE))
    for wrong in (
        logits_by_hand(module, {1: 4, 2: 4}, BACK),
        logits_by_hand(module, SCHEDULE, 3),
        logits_by_hand(module, SCHEDULE, BACK, comes_back=False),
        logits_by_hand(module, SCHEDULE, BACK, best=False),
    ):
        assert not torch.allclose(found, wrong, rtol=1e-4, atol=1e-4)
