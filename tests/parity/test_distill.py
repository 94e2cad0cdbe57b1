"""distill's loss is the paper's, number by number; and a student that is far from its teacher comes near."""

import math

import pytest
import torch
from torch import Tensor, nn

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.data.preprocess import Preprocess
from martlet.functional.distillation import divergence, hard
from martlet.techniques.distill.distill import Distill

PREPROCESS = Preprocess(size=(4, 4), resize=4)


def probabilities(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(v / temperature) for v in logits]
    return [p / sum(powers) for p in powers]


def divergence_by_hand(student: Tensor, teacher: Tensor, temperature: float, squared: bool = True) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = probabilities(t, temperature), probabilities(s, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(student) * (temperature**2 if squared else 1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_labels(temperature):
    student, teacher = torch.randn(2, 5, 7).unbind()
    found = float(divergence(student, teacher, temperature))
    assert found == pytest.approx(divergence_by_hand(student, teacher, temperature), rel=1e-5)
    assert found != pytest.approx(divergence_by_hand(teacher, student, temperature), rel=1e-2), "it isn't symmetric"
    if temperature != 1:
        assert found != pytest.approx(divergence_by_hand(student, teacher, temperature, squared=False), rel=1e-2)


def test_hard_labels():
    student, teacher = torch.randn(2, 5, 7).unbind()
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    wanted = -sum(math.log(probabilities(s, 1.0)[t.index(max(t))]) for s, t in rows) / 5
    assert float(hard(student, teacher)) == pytest.approx(wanted, rel=1e-5)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 4)

    def forward(self, x):
        return self.fc(x.flatten(1))


def model(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model(name=f"linear {seed}", module=Linear(), preprocess=PREPROCESS, num_classes=4, origin={})


@pytest.mark.parametrize("logits", ["soft", "hard"])
def test_the_student_comes_near_its_teacher(logits):
    pixels = torch.randint(0, 256, (64, 3, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    examples, teacher = Examples(pixels, None, PREPROCESS, "noise"), model(1)
    before = teacher.module.fc.weight.clone()
    technique = Distill(logits=logits, epochs=60, batch=32, rate=3e-2, weight_decay=0.0, augment="none")
    student = pipeline.run(model(2), Recipe((technique,)), Context(training=examples, teacher=teacher))
    images = examples.normalize(pixels)
    with torch.no_grad():
        agree = [
            float((m.module(images).argmax(1) == teacher.module(images).argmax(1)).float().mean())
            for m in (model(2), student)
        ]
    assert agree[0] < 0.5
    assert agree[1] > 0.95
    assert torch.equal(teacher.module.fc.weight, before)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(RecipeError, match="logits is 'medium'; it can be soft, hard"):
        Distill(logits="medium")
    with pytest.raises(RecipeError, match="temperature is 0; it has to be more than 0"):
        Distill(temperature=0)
