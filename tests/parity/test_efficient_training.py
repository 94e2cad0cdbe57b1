"""sam climbs as the papers say, coat's moments survive 8 bits, images grow by the schedule, rare classes weigh more."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from colors import colors
from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.data.preprocess import Preprocess
from martlet.functional.distillation import effective_weights
from martlet.functional.expansion import GREATEST, RANGE, contract, expand
from martlet.source import load_model
from martlet.techniques.distill.deit_lt import DeitLt
from martlet.techniques.train.coat import Coat
from martlet.techniques.train.progressive import Growing, Progressive
from martlet.techniques.train.sam import Sam
from martlet.techniques.tune.finetune import Finetune
from martlet.training import loop
from martlet.training.fp8_adamw import Fp8AdamW

SIZE = (16, 16)
PREPROCESS = Preprocess(size=SIZE, resize=16)


def vit(name: str = "timm:vit_tiny_patch16_224", seed: int = 3, **kwargs) -> Model:
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2} | kwargs
    return load_model(name, model_kwargs=tiny, num_classes=3, preprocess={"size": SIZE, "resize": 16}, seed=seed)


def examples(n: int = 48) -> Examples:
    return colors(PREPROCESS, n)


class Colors(nn.Module):
    """Logits of the mean color."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.fc = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def gradient_by_hand(w: np.ndarray, colors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    found = np.zeros_like(w)
    for color, label in zip(colors, labels, strict=True):
        logits = [sum(w[k, c] * color[c] for c in range(3)) for k in range(3)]
        total = sum(math.exp(v) for v in logits)
        for k in range(3):
            found[k] += (math.exp(logits[k]) / total - float(k == label)) * color / len(labels)
    return found


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_sam_takes_the_gradient_at_the_worst_place_nearby(rho):
    """One step of Adam, whose first is rate × sign(g), would hide it: the first moment is read instead."""
    seen = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            [p] = self.param_groups[0]["params"]
            seen.append((p.detach().clone(), p.grad.clone()))
            super().step()

    class Once(Sam):
        def optimizer(self, groups):
            return Watched(groups)

    data = examples(6)
    model = Model(name="colors", module=Colors(), preprocess=PREPROCESS, num_classes=3, origin={})
    technique = Once(rho=rho, epochs=1, batch=6, augment="none", clip=0, smoothing=0.0, weight_decay=0.0)
    pipeline.run(model, Recipe((technique,)), Context(training=data))
    [(place, gradient)] = seen
    w = model.module.fc.weight.detach().double().numpy()
    colors = data.normalize(data.pixels).mean((2, 3)).double().numpy()
    first = gradient_by_hand(w, colors, data.labels.numpy())
    wanted = gradient_by_hand(w + rho * first / np.sqrt((first**2).sum()), colors, data.labels.numpy())
    np.testing.assert_allclose(gradient.numpy(), wanted, atol=1e-6)
    assert np.abs(gradient.numpy() - first).max() > 1e-3
    assert torch.equal(place, model.module.fc.weight), "the step is taken from where the weights were"


def top_eigenvalue(model: Model, data: Examples) -> float:
    """Of the loss's Hessian, by power iteration."""
    parameters = [p.requires_grad_() for p in model.module.parameters()]
    with sdpa_kernel(SDPBackend.MATH):  # which alone has second derivatives
        loss = nn.functional.cross_entropy(model.module(data.normalize(data.pixels)), data.labels)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    torch.manual_seed(0)
    v, value = [torch.randn_like(p) for p in parameters], 0.0
    for _ in range(20):
        norm = math.sqrt(sum(float((x**2).sum()) for x in v))
        v = [x / norm for x in v]
        product = torch.autograd.grad(
            sum((s * x).sum() for s, x in zip(slopes, v, strict=True)), parameters, retain_graph=True
        )
        value = float(sum((a * b).sum() for a, b in zip(product, v, strict=True)))
        v = [x.detach() for x in product]
    return value


def test_sam_ends_in_a_flatter_place():
    settings = {"epochs": 30, "batch": 24, "rate": 3e-3, "augment": "none", "smoothing": 0.0, "weight_decay": 0.0}
    noise = examples()
    noise.labels = torch.randint(0, 3, (48,), generator=torch.Generator().manual_seed(1))
    sharp, flat = (
        pipeline.run(vit(), Recipe((t,)), Context(training=noise))
        for t in (Finetune(**settings), Sam(rho=0.05, **settings))
    )
    assert top_eigenvalue(flat, noise) < 0.5 * top_eigenvalue(sharp, noise)


def moments(spread: float) -> Tensor:
    """Of one group, as optimizers have them: over many powers of two."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(4, 128, generator=generator) * spread).exp() * torch.randn(4, 128, generator=generator).sign()


def expanded_by_hand(group: list[float]) -> list[float]:
    """Number by number; rounding to E4M3 is the format's own."""
    sizes = [abs(v) for v in group]
    greatest, least = max(sizes), min(s for s in sizes if s)
    center = math.sqrt(greatest) * math.sqrt(least)
    power = math.floor(math.log(RANGE) / math.log(greatest / least) * 16) / 16
    scale = (greatest / center) ** power / GREATEST
    found = []
    for v in group:
        code = math.copysign((abs(v) / center) ** power / scale, v)
        code = float(torch.tensor(min(code, GREATEST)).to(torch.float8_e4m3fn).float())
        found.append(math.copysign((abs(code) * scale) ** (1 / power) * center, code))
    return found


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_expansion_is_the_papers(spread):
    x = moments(spread)
    found = contract(expand(x))
    wanted = torch.tensor([expanded_by_hand(group.tolist()) for group in x])
    agree = ((found - wanted).abs() <= 0.01 * wanted.abs()).float().mean()
    assert agree > 0.98, "but for numbers halfway between two codes"


@pytest.mark.parametrize("spread", [0.5, 1.0, 6.0])
def test_expansion_loses_less_than_scaling_alone(spread):
    x = moments(spread)
    plain, ours = (contract(expand(x, expands=e)) for e in (False, True))
    errors = [float(((y - x).abs() / x.abs()).mean()) for y in (plain, ours)]
    assert errors[1] < 0.8 * errors[0]


def test_zeros_stay_and_signs_too():
    x = torch.zeros(2, 128)
    x[1, :4] = torch.tensor([1.0, -1.0, 1e-6, -1e-6])
    found = contract(expand(x))
    assert torch.equal(found == 0, x == 0)
    torch.testing.assert_close(found[1, :4], x[1, :4], rtol=0.1, atol=0)
    alike = torch.full((1, 128), 0.3)
    torch.testing.assert_close(contract(expand(alike)), alike)


def test_steps_in_8_bits_are_nearly_those_in_32():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(300)) for _ in range(2))
    groups = [{"params": [p], "lr": 1e-2, "weight_decay": 0.1} for p in (ours, theirs)]
    small, large = Fp8AdamW(groups[:1]), torch.optim.AdamW(groups[1:])
    for _ in range(20):
        gradient = torch.randn(300) * torch.logspace(-6, 0, 300)
        for parameter, optimizer in ((ours, small), (theirs, large)):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - 1).detach()
    assert float((ours - theirs).detach().norm() / moved.norm()) < 0.05
    kept = sum(t.nbytes for t in small.state[ours].values())
    assert kept < 0.4 * sum(t.nbytes for t in large.state[theirs].values())
    assert small.state[ours]["exp_avg_codes"].dtype is torch.float8_e4m3fn


class Halt(Exception):
    pass


@pytest.mark.parametrize("technique", [Coat(epochs=2, batch=16), Sam(epochs=2, batch=16)])
def test_stopped_it_goes_on_to_the_same_weights(technique, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)

    def halt(what: str, done: int, total: int) -> None:
        if what.startswith("train, loss") and done == 4:
            raise Halt

    whole = pipeline.run(vit(drop_rate=0.1), Recipe((technique,)), Context(training=examples(), seed=4))
    kept = Kept(tmp_path)
    with pytest.raises(Halt):
        pipeline.run(
            vit(drop_rate=0.1), Recipe((technique,)), Context(training=examples(), seed=4, kept=kept, progress=halt)
        )
    again = pipeline.run(vit(drop_rate=0.1), Recipe((technique,)), Context(training=examples(), seed=4, kept=kept))
    assert all(torch.equal(a, b) for a, b in zip(whole.module.parameters(), again.module.parameters(), strict=True))


def test_images_and_what_regularizes_grow_stage_by_stage(monkeypatch):
    seen = []
    loss, batch_of = Growing.loss, Examples.batch

    def look(self, student, batch):
        found = loss(self, lambda x: seen.append((x.shape[-1], student.head_drop.p)) or student(x), batch)
        return found

    policies = []
    monkeypatch.setattr(Growing, "loss", look)
    monkeypatch.setattr(
        Examples, "batch", lambda self, i, s, a="none", e=0.0: policies.append(a) or batch_of(self, i, s, a, e)
    )
    model = vit(dynamic_img_size=True, patch_size=4, drop_rate=0.05)
    technique = Progressive(epochs=4, batch=24, stages=4, multiple=4, dropout=0.3, augment="rand-m9-mstd0.5")
    done = pipeline.run(model, Recipe((technique,)), Context(training=examples()))
    assert [size for size, _ in seen] == [8, 8, 12, 12, 12, 12, 16, 16]
    assert [p for _, p in seen] == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert policies == [f"rand-m{m}-mstd0.5" for m in (3, 3, 5, 5, 7, 7, 9, 9)]
    assert done.module.head_drop.p == 0.05


def test_sides_are_the_papers():
    """EfficientNetV2-S: 128 to 300 pixels in four stages, before rounding."""
    assert Progressive(smallest=128, multiple=1).sides((300, 300)) == [(128, 128), (185, 185), (243, 243), (300, 300)]


def test_a_model_of_one_size_is_refused():
    with pytest.raises(
        RecipeError, match=r"progressive: timm:vit_tiny.* doesn't take images of 8 by 8 pixels .*dynamic"
    ):
        pipeline.run(vit(), Recipe((Progressive(),)), Context(training=examples()))


def test_effective_weights_are_the_papers():
    counts, beta = [5000, 500, 50, 0], 0.999
    raw = [(1 - beta) / (1 - beta ** max(n, 1)) for n in counts]
    wanted = [v / (sum(raw) / 4) for v in raw]
    assert effective_weights(torch.tensor(counts, dtype=torch.float32), beta).tolist() == pytest.approx(
        wanted, rel=1e-5
    )


def test_each_token_learns_its_own():
    """Half of each cross-entropy; the teacher's is weighed by class once it is late."""
    model = vit("timm:deit_tiny_distilled_patch16_224")
    teacher = vit(seed=8)
    technique = DeitLt(late=0.5, beta=0.9, smoothing=0.0)
    data = examples(7)
    data.labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    objective = technique.objective(model, Context(training=data, teacher=teacher))
    student = copy.deepcopy(model.module)
    objective.prepare_(student)
    student.train()
    images = data.normalize(data.pixels)
    labels, taught = (x.detach().double().tolist() for x in student(images))
    answers = teacher.module(images).argmax(1).tolist()

    def cross(logits: list[list[float]], wanted: list[int], weights: list[float]) -> float:
        losses = [math.log(sum(map(math.exp, row))) - row[k] for row, k in zip(logits, wanted, strict=True)]
        shares = [weights[k] for k in wanted]
        return sum(w * v for w, v in zip(shares, losses, strict=True)) / sum(shares)

    raw = [(1 - 0.9) / (1 - 0.9**n) for n in (4, 2, 1)]
    for step, weights in ((0, [1.0] * 3), (9, raw)):
        batch = loop.Batch(images=images, labels=data.labels, indices=None, seeds=None, step=step, steps=10)  # type: ignore[arg-type]
        wanted = (cross(labels, data.labels.tolist(), [1.0] * 3) + cross(taught, answers, weights)) / 2
        assert float(objective.loss(student, batch).detach()) == pytest.approx(wanted, rel=1e-4)
    objective.finish_(student)
    student.eval()
    assert student(images).shape == (7, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sam(rho=0), "sam: rho is 0; it has to be more than 0"),
        (lambda: Progressive(stages=1), "progressive: stages is 1; it can't be less than 2"),
        (lambda: Progressive(dropout=1.0), "progressive: dropout is 1.0"),
        (lambda: Progressive(minutes=3), "its first steps don't tell what later ones take; set epochs and no minutes"),
        (lambda: DeitLt(beta=1.0), "deit_lt: beta is 1.0"),
        (
            lambda: pipeline.run(vit(), Recipe((DeitLt(),)), Context(training=examples(), teacher=vit())),
            "has no distillation token; take one as timm:deit_tiny_distilled_patch16_224",
        ),
    ],
)
def test_what_can_not_be_is_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
