"""fast_sparse_convnets: zeros come as the schedule says, stay, and are skipped by a kernel that gives the same."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, silent
from martlet.engine.torch import Torch
from martlet.functional.distillation import divergence
from martlet.functional.structure.sparsity import gradual, least
from martlet.nn import sparse
from martlet.nn.sparse import SparseConv2d, pointwise, use_zeros_
from martlet.source import load_model
from martlet.techniques.distill.distill import Distill
from martlet.techniques.prune.fast_sparse_convnets import FastSparseConvNets, Sparser
from martlet.training.objective import Batch, Teacher

SIDE = 64
QUICK: dict[str, Any] = {"epochs": 4.0, "batch": 6, "rate": 1e-2, "augment": "none"}
ONE_PLACE = ("conv_reduce", "conv_expand", "conv_head")


class Pictures:
    num_images = 12

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield 2 * torch.rand(6, 3, SIDE, SIDE, generator=generator) - 1


def model() -> Model:
    """A small MobileNetV3: depthwise convolutions, squeeze and excitation, and a head of one place."""
    size = {"size": (SIDE, SIDE), "resize": (SIDE, SIDE)}
    return load_model("timm:mobilenetv3_small_050", num_classes=5, seed=3, preprocess=size)


def train(given: Model, *techniques: Any, **context: Any) -> Model:
    return pipeline.run(given, Recipe(techniques), Context(images=Pictures(), seed=1, **context))


def convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: each for name, each in module.named_modules() if isinstance(each, nn.Conv2d)}


def chosen(module: nn.Module) -> dict[str, nn.Conv2d]:
    """Those of a kernel of one by one, but for what sees one place."""
    found = {n: c for n, c in convolutions(module).items() if c.kernel_size == (1, 1) and not n.endswith(ONE_PLACE)}
    assert len(found) > 5
    return found


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


def smallest_by_hand(weight: Tensor, share: float) -> set[int]:
    """The places of the numbers of the least size, in a plain list."""
    numbers = [abs(value) for value in weight.flatten().tolist()]
    return set(sorted(range(len(numbers)), key=numbers.__getitem__)[: int(share * len(numbers))])


def test_zeros_come_as_the_schedule_says() -> None:
    for done in (Fraction(0), Fraction(1, 10), Fraction(1, 2), Fraction(9, 10), Fraction(1), Fraction(3, 2)):
        left = 1 - min(done, Fraction(1))
        assert gradual(0.75, float(done)) == pytest.approx(float(Fraction(3, 4) * (1 - left**3)), abs=1e-15)
    assert gradual(0.75, 0.5) != pytest.approx(0.75 * 0.5)  # as if it were even


def test_those_of_the_least_size_go() -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    for share in (0.0, 0.31, 0.9, 0.99):
        assert set(least(weight, share).flatten().nonzero().flatten().tolist()) == smallest_by_hand(weight, share)
    assert zeros(least(weight, 0.5)) == 35 - 17


def test_a_step_learns_from_the_weights_that_the_schedule_leaves() -> None:
    """Loss and gradient, in float64, are those of a plain model whose weights are zero; zeros have no gradient."""
    given, teacher = model(), Teacher(model(), model())
    student, plain = given.module.double().eval(), model().module.double().eval()
    teacher.model.module.double()
    with torch.no_grad():
        for a, b in zip(student.parameters(), plain.parameters(), strict=True):
            a.add_(0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(4)))
            b.copy_(a)
    names = [*pointwise(student, (SIDE, SIDE))]
    assert names == [*chosen(student)]
    objective = Sparser(teacher, names, 0.8)
    objective.prepare_(student)
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    steps, step = 40, 6
    batch = Batch(images=images, labels=None, indices=np.arange(3), seeds=np.arange(3), step=step, steps=steps)
    loss = objective.loss(student, batch)
    loss.backward()
    share = 0.8 * (1 - (1 - 7 / 20) ** 3)  # zeros come in the first half of the steps
    gone = {name: smallest_by_hand(its.weight.detach(), share) for name, its in chosen(plain).items()}
    for name, places in gone.items():
        chosen(plain)[name].weight.data.flatten()[[*places]] = 0
    expected = divergence(plain(images), teacher(images))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for name, places in gone.items():
        found = student.get_submodule(name).parametrizations.weight.original.grad.flatten()  # type: ignore[union-attr]
        wanted = chosen(plain)[name].weight.grad.flatten()  # type: ignore[union-attr]
        rest = [i for i in range(len(found)) if i not in places]
        torch.testing.assert_close(found[rest], wanted[rest], rtol=1e-8, atol=1e-14)
        assert not found[[*places]].any()
        assert wanted[[*places]].any()
    whole = divergence(student_without_masks(student)(images), teacher(images))
    assert abs(float((whole - expected).detach())) > 1e-6  # without zeros it is another loss


def student_without_masks(student: nn.Module) -> nn.Module:
    for name, buffer in student.named_buffers():
        if name.endswith(".mask"):
            buffer.fill_(1)
    return student


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_as_many_are_zero_as_were_asked_for_and_stay_so(ema: float) -> None:
    sparse_ = train(model(), FastSparseConvNets(sparsity=0.85, ema=ema, **QUICK))
    after = train(sparse_, Distill(**QUICK), teacher=model())
    for name, layer in convolutions(sparse_.module).items():
        expected = int(0.85 * layer.weight.numel()) if name in chosen(sparse_.module) else 0
        assert zeros(layer.weight) == expected, name
        later = after.module.get_submodule(name).weight
        assert isinstance(later, Tensor)
        assert torch.equal(later == 0, layer.weight == 0)
    moved = [not torch.equal(a, b) for a, b in zip(sparse_.module.parameters(), after.module.parameters(), strict=True)]
    assert any(moved)
    assert [*sparse_.module.state_dict()] == [*model().module.state_dict()]  # nothing of the training is left in it


def test_no_zeros_asked_for_leaves_none() -> None:
    done = train(model(), FastSparseConvNets(sparsity=0.0, **{**QUICK, "rate": 1e-12, "weight_decay": 0.0}))
    images = next(iter(Pictures()))
    mean = dict(model().module.named_buffers())
    with torch.no_grad():
        for name, buffer in done.module.named_buffers():
            buffer.copy_(mean[name])  # batch norms have seen the images
        torch.testing.assert_close(done.module(images), model().module.eval()(images), rtol=1e-5, atol=1e-7)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    technique, whole = FastSparseConvNets(**QUICK), train(model(), FastSparseConvNets(**QUICK))

    class Stop(Exception):
        pass

    def stop(what: str, step: int, steps: int) -> None:
        if what.startswith("train, loss") and step == 5:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("martlet.training.loop.SAVE_SECONDS", 0.0)
        with pytest.raises(Stop):
            train(model(), technique, kept=Kept(tmp_path), progress=stop)
    steps = list[int]()
    resumed = train(
        model(),
        technique,
        kept=Kept(tmp_path),
        progress=lambda what, step, n: steps.append(step) if what.startswith("train, loss") else silent(what, step, n),
    )
    assert steps == [5, 6, 7, 8]  # the step that was stopped is done again
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 5, 7), (3, 1, 9)])
def test_the_kernel_gives_what_the_dense_one_does(bias: bool, batch: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(8)
    conv = nn.Conv2d(11, 6, 1, bias=bias)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(conv.weight.shape, generator=generator) > 0.8)
        conv.weight[2] = 0  # a row of nothing
    x = torch.randn(batch, 11, height, width, generator=generator)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        found = SparseConv2d(conv)(given)
        expected = np.einsum("oi,bihw->bohw", conv.weight.detach().double()[..., 0, 0].numpy(), x.double().numpy())
        expected += 0 if conv.bias is None else conv.bias.detach().double().numpy()[:, None, None]
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_an_artifact_runs_without_its_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "LEAST", 0)
    done = train(model(), FastSparseConvNets(**QUICK))
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    images = next(iter(Pictures()))[:2].numpy()
    session = Torch().open(tmp_path / "out", batch=2)
    with torch.no_grad():
        expected = done.module(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session(images), expected, rtol=1e-4, atol=1e-6)
    ops = session.profile(images, repeats=1)
    assert {op.name for op in ops if op.kind == "sparse_conv1x1"} == set(chosen(done.module))
    again = store.load(tmp_path / "out").model()
    assert [*use_zeros_(again.module, (SIDE, SIDE))] == [*chosen(done.module)]
    assert use_zeros_(model().module, (SIDE, SIDE)) == {}


def test_small_products_and_few_zeros_stay_dense() -> None:
    given = model().module
    with torch.no_grad():
        for layer in chosen(given).values():
            layer.weight.masked_fill_(least(layer.weight, 0.9), 0)
    assert use_zeros_(given, (SIDE, SIDE)) == {}  # less to multiply than it takes to begin
    wide = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 256, 1), nn.Conv2d(256, 64, 1))
    with torch.no_grad():
        for layer, share in zip(wide, (0.0, 0.9, 0.5), strict=True):
            layer.weight.masked_fill_(least(layer.weight, share), 0)  # type: ignore[operator, arg-type]
    assert use_zeros_(wide, (SIDE, SIDE)) == {"1": pytest.approx(0.9, abs=1e-4)}
    assert isinstance(wide[1], SparseConv2d)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is the share of weights that become zero, from 0 to less than 1, not 1\.0"),
        ({"patience": 2}, "an earlier epoch would have fewer zeros"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        FastSparseConvNets(**settings)


def test_a_model_without_such_convolutions_is_told_what_to_take() -> None:
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 1}
    vit = load_model("timm:vit_tiny_patch16_224", model_kwargs=tiny, num_classes=5, seed=3)
    with pytest.raises(RecipeError, match="has no 1 × 1 convolution; sparsegpt makes weights"):
        pipeline.run(vit, Recipe((FastSparseConvNets(),)), Context(images=Pictures()))
