"""tome is the paper's, in whole models, on an oracle that matches and merges one token at a time."""

import math

import pytest
import torch
from token_oracle import Choose, Token, logits_by_hand, logits_with, mean, vit
from torch import Tensor

from martlet.techniques.tokens.tome import ToMe

SCHEDULE = {0: 4, 2: 3, 3: 2}


def merging(r: int, prefix: int = 1, grid: tuple[int, int] | None = None, informativeness: float = 0.0) -> Choose:
    """grid: merge as `2x2` does, in row order if a grid is given, else every fourth."""

    def choose(tokens: list[Token], keys: list[Tensor], seen: list[list[float]], before: list[Tensor]) -> list[Token]:
        patches = range(prefix, len(tokens))
        if grid is None:
            destinations = [t for t in patches if t % 2]
        elif len(patches) == grid[0] * grid[1]:
            destinations = [prefix + y * grid[1] + x for y in range(0, grid[0], 2) for x in range(0, grid[1], 2)]
        else:
            destinations = [t for t in patches if (t - prefix) % 4 == 0]
        sources = [t for t in patches if t not in destinations]
        edges = []
        for s in sources:
            alike = [float(torch.cosine_similarity(keys[s].mean(0), keys[d].mean(0), dim=0)) for d in destinations]
            best = max(range(len(destinations)), key=alike.__getitem__)
            log_seen = sum(map(math.log, seen[s])) / len(seen[s])
            edges.append((alike[best] - informativeness * log_seen, s, destinations[best]))
        edges.sort()
        groups = {t: [tokens[t]] for t in destinations}
        for _, s, d in edges[len(edges) - r :]:
            groups[d].append(tokens[s])
        staying = [tokens[s] for _, s, _ in edges[: len(edges) - r]]
        return tokens[:prefix] + [mean(group) for group in groups.values()] + staying

    return choose


MODELS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers and qk-norm": {"reg_tokens": 2, "qk_norm": True},
    "class token, mean of patches": {"global_pool": "avg"},
}


@pytest.mark.parametrize("partition", ["alternating", "2x2"])
@pytest.mark.parametrize(
    ("name", "informativeness"),
    [*((name, 0.0) for name in MODELS), *((name, 0.5) for name in MODELS if name[0] != "n")],
)
def test_tome_is_the_papers(name: str, partition: str, informativeness: float) -> None:
    module = vit(**MODELS[name])
    grid = (5, 3) if partition == "2x2" else None
    prefix = module.num_prefix_tokens
    by_hand = {block: merging(r, prefix, grid, informativeness) for block, r in SCHEDULE.items()}
    technique = ToMe(r=SCHEDULE, partition=partition, informativeness=informativeness)
    torch.testing.assert_close(
        logits_with(module, technique), logits_by_hand(module, by_hand, True), rtol=1e-9, atol=1e-9
    )


def test_this_can_fail() -> None:
    module = vit()
    found = logits_with(module, ToMe(r=SCHEDULE))
    right = {block: merging(r) for block, r in SCHEDULE.items()}

    def first(tokens: list[Token], keys: list[Tensor], seen: list[list[float]], before: list[Tensor]) -> list[Token]:
        """Sizes forgotten in every block."""
        return [(1.0, x) for _, x in merging(4)(tokens, keys, seen, before)]

    wrong = [
        (right, False),  # no sizes in attention
        (right | {0: first}, True),
        (right | {2: merging(2)}, True),  # another r
        (right | {0: merging(4, grid=(5, 3))}, True),  # another partition
        (right | {0: merging(4, informativeness=0.5)}, True),
    ]
    for schedule, proportional in wrong:
        assert not torch.allclose(found, logits_by_hand(module, schedule, proportional), rtol=1e-4, atol=1e-4)
