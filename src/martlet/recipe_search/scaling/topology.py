"""A topology found without training: a policy over choices learns which give better measures, by REINFORCE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

RATE, MOMENTUM = 0.08, 0.9
"""The policy's learning rate, and how slowly the mean reward follows: the official code's."""
WINDOW = 20
"""Measures by whose range a change is judged."""
BETAS, TINY = (0.9, 0.999), 1e-8
"""Of Adam."""

Measures = Mapping[str, float]
"""Of a network, by name, each the better the larger."""


@dataclass
class Policy:
    """A categorical distribution for each choice; all begin even, but for a little chance."""

    space: Mapping[str, Sequence[int]]
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.logits = {name: 1e-3 * self.rng.standard_normal(len(values)) for name, values in self.space.items()}
        self._moments = {name: np.zeros((2, len(values))) for name, values in self.space.items()}
        self._steps = 0

    def probabilities(self, name: str) -> np.ndarray:
        shifted = np.exp(self.logits[name] - self.logits[name].max())
        return shifted / shifted.sum()

    def draw(self) -> dict[str, int]:
        """By choice, which of its values."""
        return {name: int(self.rng.choice(len(p), p=p)) for name in self.space for p in [self.probabilities(name)]}

    def learn(self, drawn: Mapping[str, int], advantage: float) -> None:
        """One step of Adam up the gradient of advantage · log p(drawn)."""
        self._steps += 1
        for name, i in drawn.items():
            gradient = -advantage * self.probabilities(name)
            gradient[i] += advantage  # ∂ log p_i / ∂ logits = 1_i - p
            moments = self._moments[name]
            for moment, beta, value in zip(moments, BETAS, (gradient, gradient**2), strict=True):
                moment += (1 - beta) * (value - moment)
            first, second = (m / (1 - beta**self._steps) for m, beta in zip(moments, BETAS, strict=True))
            self.logits[name] += RATE * first / (np.sqrt(second) + TINY)

    def best(self) -> dict[str, int]:
        """The most probable value of each choice."""
        return {name: values[int(self.logits[name].argmax())] for name, values in self.space.items()}


@dataclass
class Rewards:
    """What a network gains on the one before it: the sum of its measures' changes, each over its recent range."""

    history: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, measures: Measures) -> float:
        reward = 0.0
        for name, value in measures.items():
            values = self.history.setdefault(name, [])
            values.append(value)
            recent = values[-WINDOW:]
            if len(values) > 1:
                reward += (values[-1] - values[-2]) / (max(recent) - min(recent) + 1e-6)
        return reward


def reinforce(
    space: Mapping[str, Sequence[int]], judge: Callable[[dict[str, int]], Measures], *, steps: int = 500, seed: int = 0
) -> Iterator[tuple[dict[str, int], Measures, dict[str, int]]]:
    """Draws topologies and learns from their measures; the most probable one at the end is the seed to be scaled.

    space: values of each choice. judge: measures of a topology, finite, and each the better the larger.

    Yields after each step the topology drawn, its measures, and the most probable topology so far.

    Source: Chen et al., Auto-scaling Vision Transformers without Training, 2022, arXiv 2202.11921, section 3.3, by its
    official code: 500 steps, Adam at 0.08, a mean reward of momentum 0.9 taken off.
    """
    rng = np.random.default_rng(seed)
    policy, rewards = Policy(space, rng), Rewards()
    numerator = denominator = 0.0
    for _ in range(steps):
        drawn = policy.draw()
        chosen = {name: space[name][i] for name, i in drawn.items()}
        measures = judge(chosen)
        reward = rewards(measures)
        numerator = MOMENTUM * numerator + (1 - MOMENTUM) * reward
        denominator = MOMENTUM * denominator + (1 - MOMENTUM)
        policy.learn(drawn, reward - numerator / denominator)
        yield chosen, measures, policy.best()
