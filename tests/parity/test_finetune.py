"""finetune takes the steps of the papers: AdamW, a clipped gradient, warm-up, a half cosine, smoothed labels."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.data.preprocess import Preprocess
from martlet.techniques.tune.finetune import Finetune

PREPROCESS = Preprocess(size=(2, 2), resize=2)
N, BATCH, SEED = 12, 4, 3
SETTINGS = Finetune(epochs=2, batch=BATCH, rate=0.05, weight_decay=0.1, warmup=0.34, clip=0.3, augment="none")
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Linear(nn.Module):
    """Of the mean color."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def examples() -> Examples:
    pixels = torch.randint(0, 256, (N, 3, 2, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Examples(pixels, torch.arange(N) % 3, PREPROCESS, "noise")


def start() -> Linear:
    torch.manual_seed(2)
    return Linear()


def by_hand(decoupled: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Weight (3, 3) and bias (3,) after all steps, in float64 and number by number."""
    module, data = start(), examples()
    w, b = (p.detach().double().numpy().copy() for p in (module.fc.weight, module.fc.bias))
    colors = data.pixels.double().numpy().mean((2, 3)) / 255
    colors = (colors - np.array(PREPROCESS.mean)) / np.array(PREPROCESS.std)
    moments = {name: [np.zeros_like(v), np.zeros_like(v)] for name, v in (("w", w), ("b", b))}
    steps = 2 * (N // BATCH)
    warmup = round(0.34 * steps)
    for step in range(steps):
        epoch, place = divmod(step, N // BATCH)
        rows = np.random.default_rng([SEED, epoch]).permutation(N)[place * BATCH : (place + 1) * BATCH]
        gradient = {"w": np.zeros_like(w), "b": np.zeros_like(b)}
        for row in rows:
            logits = [sum(w[k, c] * colors[row, c] for c in range(3)) + b[k] for k in range(3)]
            total = sum(math.exp(v) for v in logits)
            for k in range(3):
                wanted = 0.1 / 3 + (0.9 if k == row % 3 else 0.0)
                slope = (math.exp(logits[k]) / total - wanted) / BATCH
                gradient["b"][k] += slope
                for c in range(3):
                    gradient["w"][k, c] += slope * colors[row, c]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        t = step + 1
        if t < warmup:
            rate = SETTINGS.rate * t / warmup
        else:
            rate = SETTINGS.rate * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup + 1)))
        for name, value, decay in (("w", w, 0.1), ("b", b, 0.0)):
            g = gradient[name] * min(1.0, 0.3 / norm)
            if not decoupled:
                g = g + decay * value
            first, second = moments[name]
            first[:] = BETA1 * first + (1 - BETA1) * g
            second[:] = BETA2 * second + (1 - BETA2) * g**2
            if decoupled:
                value -= rate * decay * value
            value -= rate * (first / (1 - BETA1**t)) / (np.sqrt(second / (1 - BETA2**t)) + EPSILON)
    return w, b


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    model = Model(name="linear", module=start(), preprocess=PREPROCESS, num_classes=3, origin={})
    return pipeline.run(model, Recipe((SETTINGS,)), Context(training=examples(), seed=SEED)).module


def test_every_step_is_the_papers(learned):
    w, b = by_hand()
    np.testing.assert_allclose(learned.fc.weight.detach().numpy(), w, rtol=0, atol=2e-5)
    np.testing.assert_allclose(learned.fc.bias.detach().numpy(), b, rtol=0, atol=2e-5)


def test_decay_inside_the_gradient_would_be_seen(learned):
    w, _ = by_hand(decoupled=False)
    assert np.abs(learned.fc.weight.detach().numpy() - w).max() > 1e-3
