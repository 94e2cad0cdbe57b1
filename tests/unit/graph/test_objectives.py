"""Objectives against float64 versions written from their papers, with the whole Hessian and no batches.

Wu et al., APHQ-ViT, arXiv 2504.02508; Wu et al., FIMA-Q, arXiv 2506.11543.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from martlet.graph.objectives import (
    OBJECTIVES,
    TEMPERATURE,
    Block,
    diagonal_plus_low_rank,
    mean_squared,
    perturbation_hessian,
)

IMAGES, TOKENS, WIDTH = 6, 3, 4


class Rest(nn.Module):
    """What follows a block: tokens are mixed, averaged and classified."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.mix = nn.Parameter(2 * torch.randn(WIDTH, WIDTH, generator=generator).double())
        self.head = nn.Parameter(5 * torch.randn(WIDTH, 5, generator=generator).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x @ self.mix).mean(1) @ self.head


def block(noise: float = 0.1, steps: int = 10) -> tuple[Block, Tensor]:
    """A block, and the error of what it gives now (IMAGES, TOKENS, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(IMAGES, TOKENS, WIDTH, generator=generator).double()
    error = noise * torch.randn(output.shape, generator=generator).double()
    rest = symbolic_trace(Rest())
    assert isinstance(rest, GraphModule)
    return Block(rest, output, lambda: output + error, steps), error


def divergence(rest: nn.Module, exact: Tensor, output: Tensor) -> Tensor:
    """KL of one image's logits at temperature T, written out."""
    p = torch.softmax(rest(exact[None])[0].detach() / TEMPERATURE, 0)
    q = torch.softmax(rest(output[None])[0] / TEMPERATURE, 0)
    return (p * (p.log() - q.log())).sum()


def oracle_perturbation(its: Block, error: Tensor, images: Tensor) -> float:
    assert its.rest is not None
    total = torch.zeros(TOKENS * WIDTH).double()
    for exact in its.output:
        hessian = torch.autograd.functional.hessian(
            lambda x, exact=exact: divergence(its.rest, exact, x.reshape(TOKENS, WIDTH)), exact.flatten()
        )
        total += (hessian @ torch.ones(TOKENS * WIDTH).double()).abs()
    importance = (total / total.mean()).reshape(TOKENS, WIDTH)
    return float((error.square() * importance).mean())


class OracleFisher:
    """The matrix itself, G' (D D')^-1 G + diag(mean G), and quadratic forms with it."""

    def __init__(self, its: Block) -> None:
        self.its, self.g, self.d = its, list[Tensor](), list[Tensor]()

    def add(self) -> None:
        assert self.its.rest is not None
        now, gradients = self.its.now(), []
        for exact, output in zip(self.its.output, now, strict=True):
            x = output.clone().requires_grad_()
            gradients.append(torch.autograd.grad(divergence(self.its.rest, exact, x), x)[0].abs().flatten())
        self.g.append(torch.stack(gradients).mean(0))
        self.d.append((now - self.its.output).abs().mean(0).flatten())

    def parts(self, error: Tensor) -> tuple[float, float]:
        g, d = torch.stack(self.g), torch.stack(self.d)
        matrix = g.T @ torch.linalg.inv(d @ d.T) @ g
        low_rank = sum(float(e.abs().flatten() @ matrix @ e.abs().flatten()) for e in error) / len(error)
        return low_rank, float((error.flatten(1).square() * g.mean(0)).mean())


ALL = torch.arange(IMAGES)


def test_perturbation_hessian_is_the_papers() -> None:
    its, error = block()
    for images in (ALL, torch.tensor([4, 1])):
        found = float(perturbation_hessian(its)(error[images], images))
        assert found == pytest.approx(oracle_perturbation(its, error[images], images), rel=1e-9)


def test_a_fault_in_the_perturbation_hessian_shows() -> None:
    its, error = block()
    expected = oracle_perturbation(its, error, ALL)
    wrong = [
        mean_squared(its)(error, ALL),
        perturbation_hessian(replace(its, output=its.output + 0.5))(error, ALL),
        perturbation_hessian(its)(error.flip(2), ALL),
    ]
    for value in wrong:
        assert float(value) != pytest.approx(expected, rel=1e-3)


def test_diagonal_plus_low_rank_is_the_papers() -> None:
    """With a second row added half way, at which the error has changed."""
    its, error = block(steps=10)
    errors = [error]
    moving = replace(its, now=lambda: its.output + errors[-1])
    loss, oracle = diagonal_plus_low_rank(moving), OracleFisher(moving)
    for step in range(4):
        if step % 2 == 0:
            oracle.add()
            first = oracle.parts(errors[-1])
        low_rank, diagonal = oracle.parts(errors[-1])
        found = float(loss(errors[-1], ALL))
        assert found == pytest.approx(low_rank / first[0] + diagonal / first[1], rel=1e-6)
        if step % 2 == 0:
            assert found == pytest.approx(2.0)
        generator = torch.Generator().manual_seed(step)
        errors.append(0.1 * torch.randn(error.shape, generator=generator).double())


def test_a_fault_in_diagonal_plus_low_rank_shows() -> None:
    its, error = block()
    oracle = OracleFisher(its)
    oracle.add()
    first, other = oracle.parts(error), error * torch.tensor([[1.0], [0.0], [0.0]])
    low_rank, diagonal = oracle.parts(other)
    expected = low_rank / first[0] + diagonal / first[1]
    loss = diagonal_plus_low_rank(its)
    loss(error, ALL)
    assert float(loss(other, ALL)) == pytest.approx(expected, rel=1e-6)
    assert 2 * diagonal / first[1] != pytest.approx(expected, rel=1e-3)
    assert 2 * low_rank / first[0] != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "mse"])
def test_the_last_block_keeps_the_divergence_small(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(IMAGES, 5, generator=generator).double()
    error = torch.randn(IMAGES, 5, generator=generator).double()
    loss = OBJECTIVES[name](Block(None, logits, lambda: logits + error, 1))
    picked = torch.tensor([5, 2])
    p, q = torch.softmax(logits[picked], 1), torch.softmax((logits + error)[picked], 1)
    expected = float((p * (p.log() - q.log())).sum() / 2)
    assert float(loss(error[picked], picked)) == pytest.approx(expected)
    assert float(loss(torch.zeros_like(error[picked]), picked)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_error_costs_nothing_and_every_error_has_a_gradient(name: str) -> None:
    its, error = block()
    loss = OBJECTIVES[name](its)
    loss(error, ALL)
    assert float(loss(torch.zeros_like(error), ALL)) == 0
    x = error.clone().requires_grad_()
    loss(x, ALL).backward()
    assert bool((x.grad.abs().sum((0, 1)) > 0).all())
