"""distill: the student learns the teacher's logits, and its features or attention relations if asked; no labels."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor, nn

from martlet.core.errors import RecipeError, UsageError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.distillation import divergence, hard, relation_divergence, relations, relative_error
from martlet.training.objective import Batch, Objective, Taught, Teacher
from martlet.training.signals import counterparts, observe
from martlet.training.technique import Training
from martlet.vit.view import VitView, view

LOGITS = ("soft", "hard")


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """Train the model as it stands to give the logits of a teacher: the untouched model, or a better one.

    What pruning, factorizing or reducing tokens cost comes back this way, from images without labels. A model that is
    as it was learns from itself, which `mixup` or a policy of `augment` make more than what it knows. One that a repair
    left nearly right wants a tenth of the default rate, or it forgets more than it gains. To start from random
    weights, or from a task of one's own, labels say more (`finetune`).

    Args:
        logits: `soft`, the teacher's probabilities; `hard`, only its first answer.
        temperature: that both models' logits are divided by, if soft.
        features: how much the relative error of the tokens after each block weighs beside the logits; 0 leaves it out.
            A block learns from the teacher's that is as deep, through a Linear that learns along if that is wider.
        relations: how much it weighs that tokens attend to each other as in the teacher: between queries, between keys
            and between values; 0 leaves it out.

    Shape: none changes.
    Needs: images; labels aren't used. A teacher of the same classes: the untouched model if none is given.
    Cost: about four inferences a step and image, in floating point; nothing at run time.
    Paper: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531; Touvron et al., DeiT,
        2021, arXiv 2012.12877, hard distillation; Romero et al., FitNets, 2015, arXiv 1412.6550 (features); Wang et
        al., MiniLMv2, 2021, arXiv 2012.15828 (relations); of the latter two the text wasn't read again.
    Differs: nothing is learned from labels, which the first two weigh in. DeiT's own token for it isn't added, for
        structure stays. Features and relations are learned in all blocks and together with the logits; FitNets learns
        those of one first, and as an error that isn't relative; MiniLMv2 learns those of one block, alone.
    Raises: RecipeError for a setting out of range or without images; UsageError for a teacher with other classes, or
        with other tokens where features or relations are learned; SourceError for models that don't show these; and as
        the loop does.
    """

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "train the model to give a teacher's logits, from images without labels"
    paper: ClassVar[str] = "Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})

    logits: str = "soft"
    temperature: float = 1.0
    features: float = 0.0
    relations: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logits not in LOGITS:
            raise RecipeError(f"distill: logits is {self.logits!r}; it can be {', '.join(LOGITS)}")
        if not self.temperature > 0:
            raise RecipeError(f"distill: temperature is {self.temperature}; it has to be more than 0")
        for name in ("features", "relations"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"distill: {name} is {getattr(self, name)}; it can't be less than 0")

    def objective(self, model: Model, context: Context) -> Objective:
        assert context.teacher is not None
        teacher, temperature = Teacher(context.teacher, model), None if self.logits == "hard" else self.temperature
        if not self.features and not self.relations:
            return Logits(teacher, temperature)
        return Inside(teacher, temperature, view(model.module), self.features, self.relations, context.seed)


class Logits(Taught):
    """temperature: None learns the teacher's first answer."""

    def __init__(self, teacher: Teacher, temperature: float | None) -> None:
        super().__init__(teacher)
        self.temperature = temperature

    def error(self, logits: Tensor, wanted: Tensor) -> Tensor:
        return hard(logits, wanted) if self.temperature is None else divergence(logits, wanted, self.temperature)


class Inside(Logits):
    """And what leads to the logits. features, relations: how much they weigh beside them."""

    def __init__(
        self,
        teacher: Teacher,
        temperature: float | None,
        student: VitView,
        features: float,
        relations: float,
        seed: int,
    ) -> None:
        super().__init__(teacher, temperature)
        theirs = view(teacher.model.module).blocks
        self.features, self.relations = features, relations
        self.names = [block.name for block in student.blocks]
        self.blocks = counterparts(len(student.blocks), len(theirs))
        self.adapters, generator = nn.ModuleList(), torch.Generator().manual_seed(seed)
        for block, i in zip(student.blocks, self.blocks, strict=True):
            width, wanted = (its.mlp.fc2.weight.shape[0] for its in (block, theirs[i]))
            self.adapters.append(nn.Identity() if width == wanted else nn.Linear(width, wanted))
        for parameter in self.adapters.parameters():
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        self.heads = [theirs[i].attention.num_heads for i in self.blocks]

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        logits, own = observe(student, batch.images, self.relations > 0)
        wanted, signals = self.teacher.observe(batch.images, self.relations > 0)
        signals = signals.at(self.blocks)
        for name, ours, theirs in zip(self.names, own.tokens, signals.tokens, strict=True):
            if ours.shape[1:-1] != theirs.shape[1:-1]:
                raise UsageError(
                    f"distill: {self.teacher.model.name} has tokens {tuple(theirs.shape[1:-1])} where {name} has "
                    f"{tuple(ours.shape[1:-1])}; leave features and relations out, or choose another teacher"
                )
        loss = self.error(logits, wanted)
        if self.features:
            errors = [
                relative_error(f(x), t) for f, x, t in zip(self.adapters, own.tokens, signals.tokens, strict=True)
            ]
            loss = loss + self.features * torch.stack(errors).mean()
        if self.relations:
            errors = [
                relation_divergence(relations(x, x, gcd(heads, x.shape[-1])), relations(t, t, gcd(heads, x.shape[-1])))
                for heads, ours, theirs in zip(self.heads, own.attention, signals.attention, strict=True)
                for x, t in zip(ours, theirs, strict=True)
            ]
            loss = loss + self.relations * torch.stack(errors).mean()
        return loss
