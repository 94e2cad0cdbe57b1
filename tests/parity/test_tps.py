"""tps squeezes what doesn't stay into what does, in whole models, on an oracle that goes token by token."""

import math

import pytest
import torch
from token_oracle import Choose, Token, logits_by_hand, logits_with, vit
from torch import Tensor

from martlet.techniques.tokens.tps import TPS

SCHEDULE = {0: 4, 2: 3, 3: 2}
SHARPNESS = 100.0
"""With which the epsilon of the layer norm, which the oracle has not, becomes an error of 1e-8 in the logits."""


def squeezing(
    r: int, prefix: int = 1, grid: tuple[int, int] = (5, 3), informativeness: float = 0.3, sharpness: float = SHARPNESS
) -> Choose:
    def choose(tokens: list[Token], keys: list[Tensor], seen: list[list[float]], before: list[Tensor]) -> list[Token]:
        patches = range(prefix, len(tokens))
        if len(patches) == grid[0] * grid[1]:
            anchors = [prefix + y * grid[1] + x for y in range(0, grid[0], 2) for x in range(0, grid[1], 2)]
        else:
            anchors = [t for t in patches if (t - prefix) % 4 == 0]

        def alike(a: int, b: int) -> float:
            return float(torch.corrcoef(torch.stack([before[a], before[b]]))[0, 1])

        def dispensable(t: int) -> float:
            log_seen = sum(map(math.log, seen[t])) / len(seen[t])
            return max(alike(t, anchor) for anchor in anchors) - informativeness * log_seen

        others = sorted((t for t in patches if t not in anchors), key=dispensable)
        staying = anchors + others[: len(patches) - r - len(anchors)]
        sums = {t: (0.0, torch.zeros_like(tokens[0][1])) for t in staying}
        for t in patches:
            size, x = tokens[t]
            pull = [math.exp(sharpness * (alike(t, s) - 1)) for s in staying]
            for s, share in zip(staying, pull, strict=True):
                part = size * share / sum(pull)
                sums[s] = sums[s][0] + part, sums[s][1] + part * x
        return tokens[:prefix] + [(size, total / size) for size, total in sums.values()]

    return choose


MODELS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers and qk-norm": {"reg_tokens": 2, "qk_norm": True},
}


@pytest.mark.parametrize(
    ("name", "informativeness"),
    [("class token", 0.3), ("registers and qk-norm", 0.3), ("class token", 0.0), ("registers and qk-norm", 0.0)],
)
def test_tps_squeezes(name: str, informativeness: float) -> None:
    module = vit(**MODELS[name])
    prefix = module.num_prefix_tokens
    by_hand = {block: squeezing(r, prefix, informativeness=informativeness) for block, r in SCHEDULE.items()}
    found = logits_with(module, TPS(r=SCHEDULE, informativeness=informativeness))
    torch.testing.assert_close(found, logits_by_hand(module, by_hand, True), rtol=1e-6, atol=1e-6)


def test_every_token_gets_what_became_of_it() -> None:
    """A mean over patches: each is as large as what it stands for."""
    module = vit(**MODELS["no class token"])
    by_hand = {block: squeezing(r, 0, informativeness=0) for block, r in SCHEDULE.items()}
    found = logits_with(module, TPS(r=SCHEDULE, informativeness=0))
    torch.testing.assert_close(found, logits_by_hand(module, by_hand, True), rtol=1e-6, atol=1e-6)


def test_this_can_fail() -> None:
    module = vit()
    found = logits_with(module, TPS(r=SCHEDULE))
    right = {block: squeezing(r) for block, r in SCHEDULE.items()}

    def first(tokens: list[Token], keys: list[Tensor], seen: list[list[float]], before: list[Tensor]) -> list[Token]:
        """Likeness after the attention."""
        return squeezing(4)(tokens, keys, seen, [x for _, x in tokens])

    wrong = [
        (right, False),  # no sizes in attention
        (right | {0: first}, True),
        (right | {2: squeezing(2)}, True),  # another r
        (right | {0: squeezing(4, grid=(3, 5))}, True),  # other anchors
        (right | {0: squeezing(4, informativeness=0)}, True),
        (right | {0: squeezing(4, sharpness=10)}, True),
    ]
    for schedule, proportional in wrong:
        assert not torch.allclose(found, logits_by_hand(module, schedule, proportional), rtol=1e-4, atol=1e-4)
