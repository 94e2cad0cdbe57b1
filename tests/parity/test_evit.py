"""evit is the paper's, in whole models, on an oracle that keeps and fuses one token at a time."""

import pytest
import torch
from token_oracle import Choose, Token, logits_by_hand, logits_with, vit
from torch import Tensor

from martlet.techniques.tokens.evit import EViT

SCHEDULE = {1: 4, 2: 5, 3: 1}


def keeping(r: int, prefix: int = 1, by_size: bool = False) -> Choose:
    def choose(
        tokens: list[Token], keys: list[Tensor], by_head: list[list[float]], before: list[Tensor]
    ) -> list[Token]:
        seen = [sum(each) / len(each) for each in by_head]
        ranked = sorted(range(prefix, len(tokens)), key=lambda t: -seen[t])
        keep = len(ranked) - r - 1
        weight = sum(seen[t] for t in ranked[keep:])
        fused = sum((1 / (r + 1) if by_size else seen[t] / weight) * tokens[t][1] for t in ranked[keep:])
        kept = [tokens[t] for t in ranked[:keep]]
        return [*tokens[:prefix], (1.0, fused), *kept]  # type: ignore[list-item]

    return choose


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2, "qk_norm": True}])
def test_evit_is_the_papers(kwargs: dict[str, object]) -> None:
    module = vit(**kwargs)
    by_hand = {block: keeping(r, module.num_prefix_tokens) for block, r in SCHEDULE.items()}
    found = logits_with(module, EViT(r=SCHEDULE))
    torch.testing.assert_close(found, logits_by_hand(module, by_hand, False), rtol=1e-9, atol=1e-9)


def test_this_can_fail() -> None:
    module = vit()
    found = logits_with(module, EViT(r=SCHEDULE))
    right = {block: keeping(r) for block, r in SCHEDULE.items()}
    for wrong in ({2: keeping(4)}, {1: keeping(4, by_size=True)}, {3: keeping(0)}):
        assert not torch.allclose(found, logits_by_hand(module, right | wrong, False), rtol=1e-4, atol=1e-4)
