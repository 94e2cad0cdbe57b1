"""turbo merges what has the least information degree, in whole models, on an oracle that goes token by token."""

import pytest
import torch
from token_oracle import Choose, Token, logits_by_hand, logits_with, mean, vit
from torch import Tensor

from martlet.techniques.tokens.turbo import Turbo

SCHEDULE = {1: 4, 2: 3, 3: 2}


def merging(
    r: int, prefix: int = 1, grid: tuple[int, int] = (5, 3), alpha: float = 10.0, head: int | None = None
) -> Choose:
    """head: the semantic value is that of one head, which the paper's isn't."""

    def choose(tokens: list[Token], keys: list[Tensor], seen: list[list[float]], before: list[Tensor]) -> list[Token]:
        patches = range(prefix, len(tokens))
        if len(patches) == grid[0] * grid[1]:
            destinations = [prefix + y * grid[1] + x for y in range(0, grid[0], 2) for x in range(0, grid[1], 2)]
        else:
            destinations = [t for t in patches if (t - prefix) % 4 == 0]
        sources = [t for t in patches if t not in destinations]

        def redundancy(s: int, d: int) -> float:
            return float(torch.cosine_similarity(keys[s].mean(0), keys[d].mean(0), dim=0))

        def degree(s: int) -> float:
            value = sum(seen[s]) / len(seen[s]) if head is None else seen[s][head]
            return max(redundancy(s, d) for d in destinations) - alpha * value

        ranked = sorted(sources, key=degree)  # those that stay first
        groups = {d: [tokens[d]] for d in destinations}
        for s in ranked[len(ranked) - r :]:
            groups[max(destinations, key=lambda d: redundancy(s, d))].append(tokens[s])
        staying = [tokens[s] for s in ranked[: len(ranked) - r]]
        return [*tokens[:prefix], *map(mean, groups.values()), *staying]

    return choose


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2, "qk_norm": True}])
@pytest.mark.parametrize("alpha", [10.0, 0.0, 1e4])
def test_turbo_is_the_papers(kwargs: dict[str, object], alpha: float) -> None:
    module = vit(**kwargs)
    by_hand = {block: merging(r, module.num_prefix_tokens, alpha=alpha) for block, r in SCHEDULE.items()}
    found = logits_with(module, Turbo(r=SCHEDULE, alpha=alpha))
    torch.testing.assert_close(found, logits_by_hand(module, by_hand, True), rtol=1e-9, atol=1e-9)


def test_this_can_fail() -> None:
    module = vit()
    found = logits_with(module, Turbo(r=SCHEDULE, alpha=10.0))
    right = {block: merging(r) for block, r in SCHEDULE.items()}
    wrong = [
        (right, False),  # no sizes in attention
        (right | {1: merging(4, alpha=0.0)}, True),  # redundancy alone
        (right | {1: merging(4, alpha=1e4)}, True),  # value alone
        (right | {1: merging(4, grid=(3, 5))}, True),  # other destinations
        (right | {2: merging(2)}, True),
        (right | {1: merging(4, head=0)}, True),
    ]
    for schedule, proportional in wrong:
        assert not torch.allclose(found, logits_by_hand(module, schedule, proportional), rtol=1e-4, atol=1e-4)
