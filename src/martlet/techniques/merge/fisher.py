"""fisher: the mean of several fine-tunes' weights, each weighed by how much the model's answers depend on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Batches, Context
from martlet.functional.merging import Mean
from martlet.merging.technique import Finetune, Merging, State

FLOOR = 1e-6
"""Least Fisher information, so that weights that no model needs are averaged."""


@dataclass(frozen=True, kw_only=True)
class Fisher(Merging):
    """Average fine-tunes, weighing each weight by its Fisher information on the images of the model's own task.

    Where only one of the models needs a weight, it is that model's; where both need it alike, their mean, as in `soup`.
    The right choice where each model's task has some images.

    Args:
        draws: labels that are drawn for each image from what the model answers. 0 takes all classes, by their
            probability: as many backward passes an image as there are classes.

    Shape: none changes.
    Needs: the fine-tunes, and images of each one's task, without labels (`martlet merge --images`).
    Cost: a forward pass and a backward pass a label for each image and model; nothing at run time.
    Paper: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, 2022, arXiv 2111.09832; held
        against the official code.
    Differs: all models weigh alike, and none is the target, so every Fisher has the floor that the official code gives
        its target's. Each model's Fishers are divided by their norm, as there.
    Raises: RecipeError without fine-tunes, for one without images, or for draws out of range.
    """

    name: ClassVar[str] = "fisher"
    summary: ClassVar[str] = "fine-tunes' mean, by how much each model's answers depend on a weight"
    paper: ClassVar[str] = "Matena and Raffel, Merging Models with Fisher-Weighted Averaging, 2022, arXiv 2111.09832"
    needs_images: ClassVar[bool] = True

    draws: int = 0

    def __post_init__(self) -> None:
        if self.draws < 0:
            raise RecipeError(f"fisher: draws is {self.draws}; it can't be less than 0")

    def merge(self, base: State, finetunes: Sequence[Finetune], model: Model, context: Context) -> State:
        twin = copy.deepcopy(model.module).eval().requires_grad_(True)
        means = {name: Mean(tensor) for name, tensor in base.items()}
        for i, finetune in enumerate(finetunes):
            images = finetune.images or context.calibration(self)
            twin.load_state_dict(finetune.read())
            context.progress(f"what {finetune.name} depends on", i, len(finetunes))
            fisher = information(twin, images, self.draws, torch.Generator().manual_seed(context.seed))
            norm = torch.stack([f.square().sum() for f in fisher.values()]).sum().sqrt().clamp(min=FLOOR)
            for name, mean in means.items():
                weight = (fisher[name].clamp(min=FLOOR) / norm).float()  # so that a sum of equal ones is exact
                mean.add_(twin.get_parameter(name).detach(), weight.double())
        return {name: mean.value for name, mean in means.items()}


def information(module: nn.Module, images: Batches, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of every parameter by name, float64, averaged over images.

    draws: labels of each image that are drawn; 0 takes all.
    """
    parameters = dict(module.named_parameters())
    total = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    own = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    with torch.enable_grad():
        for image in _one_by_one(images):
            logs = functional.log_softmax(module(image)[0].float(), 0)  # (K,)
            if draws:
                chosen = torch.multinomial(logs.detach().exp(), draws, replacement=True, generator=generator)
                weights = torch.full((draws,), 1 / draws)
            else:
                chosen, weights = torch.arange(len(logs)), logs.detach().exp()
            for k, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
                gradients = torch.autograd.grad(
                    logs[k], list(parameters.values()), retain_graph=True, allow_unused=True
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        own[name].addcmul_(gradient, gradient, value=weight)  # p(y|x) (∇ log p(y|x))²
            for name, found in own.items():
                total[name] += found
                found.zero_()
    return {name: value / images.num_images for name, value in total.items()}


def _one_by_one(images: Batches) -> Iterator[Tensor]:
    for batch in images:
        yield from batch.split(1)
