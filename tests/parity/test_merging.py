"""Merging is the papers', number by number; equal Fishers are a soup; what opcm adds is orthogonal to what it has."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.preprocess import Preprocess
from martlet.functional.merging import Mean, disjoint_mean, drop, elect, project_away, trim
from martlet.merging.technique import Finetune
from martlet.techniques.merge.dare import Dare
from martlet.techniques.merge.fisher import Fisher, information
from martlet.techniques.merge.opcm import Opcm
from martlet.techniques.merge.soup import Soup
from martlet.techniques.merge.task_arithmetic import TaskArithmetic
from martlet.techniques.merge.ties import Ties

PREPROCESS = Preprocess(size=(2, 2), resize=2)


class Small(nn.Module):
    """Two Linears and a batch norm, whose statistics are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
        self.register_buffer("table", torch.ones(2), persistent=False)  # as timm keeps those of positions

    def forward(self, x):
        return self.fc2(self.norm(self.fc1(x.mean((2, 3)))).relu())


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(name="small", module=Small().eval(), preprocess=PREPROCESS, num_classes=4, origin={})


class Noise:
    num_images = 6

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self):
        yield torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(self.seed))


def states(n: int = 3) -> list[dict[str, Tensor]]:
    return [model(seed).module.state_dict() for seed in range(1, n + 1)]


def merged(technique, finetunes: list[dict[str, Tensor]], images: bool = False) -> dict[str, Tensor]:
    given = tuple(
        Finetune(name=str(i), read=lambda s=s: s, images=Noise(i) if images else None) for i, s in enumerate(finetunes)
    )
    return pipeline.run(
        model(), Recipe((technique,)), Context(finetunes=given, images=Noise(9), seed=3)
    ).module.state_dict()


def numbers(state: dict[str, Tensor], names: list[str]) -> list[float]:
    return [float(v) for name in names for v in state[name].flatten()]


NAMES = [name for name, _ in Small().named_parameters()]


def test_soup():
    found = merged(Soup(), states())
    wanted = np.mean([numbers(state, NAMES) for state in states()], 0)
    np.testing.assert_allclose(numbers(found, NAMES), wanted, atol=1e-7)
    assert torch.equal(found["norm.num_batches_tracked"], model().module.state_dict()["norm.num_batches_tracked"])


def test_statistics_are_averaged_by_every_method():
    given = states(2)
    for i, state in enumerate(given):
        state["norm.running_var"] = torch.full((5,), 1.0 + 2 * i)
    assert merged(Ties(), given)["norm.running_var"].tolist() == [2.0] * 5


@pytest.mark.parametrize("scale", [0.4, -1.0])
def test_task_arithmetic(scale):
    base, found = numbers(model().module.state_dict(), NAMES), merged(TaskArithmetic(scale=scale), states())
    tuned = [numbers(state, NAMES) for state in states()]
    wanted = [b + scale * sum(t[i] - b for t in tuned) for i, b in enumerate(base)]
    np.testing.assert_allclose(numbers(found, NAMES), wanted, atol=1e-6)


def ties_by_hand(trim_ratio: float, elects: bool = True) -> list[float]:
    base = numbers(model().module.state_dict(), NAMES)
    vectors = [[t - b for t, b in zip(numbers(state, NAMES), base, strict=True)] for state in states()]
    for vector in vectors:
        smallest = sorted(range(len(vector)), key=lambda i: abs(vector[i]))[: int(len(vector) * trim_ratio)]
        for i in smallest:
            vector[i] = 0.0
    totals = [sum(v[i] for v in vectors) for i in range(len(base))]
    majority = math.copysign(1, sum(int(t > 0) - int(t < 0) for t in totals))
    found = []
    for i, b in enumerate(base):
        sign = math.copysign(1, totals[i]) if totals[i] else majority
        agree = [v[i] for v in vectors if v[i] != 0 and (not elects or math.copysign(1, v[i]) == sign)]
        found.append(b + (sum(agree) / len(agree) if agree else 0.0))
    return found


@pytest.mark.parametrize("trim_ratio", [0.0, 0.5, 0.8])
def test_ties(trim_ratio):
    found = numbers(merged(Ties(trim_ratio=trim_ratio), states()), NAMES)
    np.testing.assert_allclose(found, ties_by_hand(trim_ratio), atol=1e-6)
    if trim_ratio < 0.8:  # where more is left out, few meet
        assert np.abs(np.array(found) - ties_by_hand(trim_ratio, elects=False)).max() > 1e-3


def test_where_signs_cancel_the_majority_decides():
    x = torch.tensor([[1.0, 2.0, -3.0], [-1.0, 1.0, 5.0]])
    assert elect(x).tolist() == [1.0, 1.0, 1.0]
    assert disjoint_mean(x, elect(x)).tolist() == [1.0, 1.5, 5.0]
    assert trim(torch.tensor([1.0, -5.0, 2.0, 0.5]), 0.5).tolist() == [0.0, -5.0, 2.0, 0.0]


def test_dare_drops_by_chance_and_keeps_the_mean():
    ones = torch.ones(20_000)
    found = drop(ones, 0.9, torch.Generator().manual_seed(0))
    assert found.unique().tolist() == pytest.approx([0.0, 10.0])
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)
    exact = merged(Dare(drop_ratio=0.0, scale=0.4), states())
    wanted = merged(TaskArithmetic(scale=0.4), states())
    assert all(torch.allclose(exact[name], wanted[name], atol=1e-6) for name in NAMES)
    assert not torch.allclose(merged(Dare(), states())["fc1.weight"], wanted["fc1.weight"], atol=1e-3)


def test_the_fisher_of_a_logistic_regression_is_the_analytic_one():
    """E_x p_k (1 - p_k) x_c² for the weight of class k and feature c, in float64 and number by number."""
    layer = nn.Linear(3, 4)

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x.mean((2, 3)))

    images = Noise(2)
    [x] = images
    found = information(Regression(), images, 0, torch.Generator())
    wanted, unweighted = np.zeros((4, 3)), np.zeros((4, 3))
    for row in x.double().mean((2, 3)).tolist():
        logits = [
            sum(w * v for w, v in zip(ws, row, strict=True)) + b
            for ws, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        ]
        powers = [math.exp(v) for v in logits]
        p = [v / sum(powers) for v in powers]
        for k in range(4):
            for c in range(3):
                wanted[k, c] += p[k] * (1 - p[k]) * row[c] ** 2 / len(x)
                unweighted[k, c] += (1 - p[k]) ** 2 * row[c] ** 2 / len(x)
    np.testing.assert_allclose(found["layer.weight"].numpy(), wanted, rtol=1e-4)
    assert np.abs(found["layer.weight"].numpy() / unweighted - 1).max() > 0.1, "labels weigh by their probability"
    drawn = information(Regression(), images, 400, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(drawn["layer.weight"].numpy(), wanted, rtol=0.3)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_equal_fishers_are_a_soup_bit_for_bit(n):
    tensors = [torch.randn(40, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    fisher = torch.rand(40, generator=torch.Generator().manual_seed(99)).double().float()
    plain, weighed, unequal = (Mean(tensors[0]) for _ in range(3))
    for i, tensor in enumerate(tensors):
        plain.add_(tensor)
        weighed.add_(tensor, fisher.double())
        unequal.add_(tensor, (fisher * (i + 1)).double())
    assert torch.equal(plain.value, weighed.value)
    assert not torch.equal(plain.value, unequal.value)


def test_fisher():
    given = states(2)
    found = merged(Fisher(), given, images=True)
    fishers = []
    for i, state in enumerate(given):
        twin = model().module
        twin.load_state_dict(state)
        fishers.append(numbers(information(twin, Noise(i), 0, torch.Generator()), NAMES))
    norms = [math.sqrt(sum(f**2 for f in fisher)) for fisher in fishers]
    tuned = [numbers(state, NAMES) for state in given]
    wanted, unnormalized = (
        [
            sum(max(f[j], 1e-6) / n * t[j] for f, n, t in zip(fishers, ns, tuned, strict=True))
            / sum(max(f[j], 1e-6) / n for f, n in zip(fishers, ns, strict=True))
            for j in range(len(tuned[0]))
        ]
        for ns in (norms, [1.0, 1.0])
    )
    np.testing.assert_allclose(numbers(found, NAMES), wanted, atol=1e-5)
    assert np.abs(np.array(numbers(found, NAMES)) - unnormalized).max() > 1e-3
    assert all(torch.equal(v, merged(Soup(), [given[0]] * 3)[k]) for k, v in merged(Fisher(), [given[0]] * 3).items())


def opcm_by_hand(share: float) -> dict[str, np.ndarray]:
    """As the official code goes about it, in float64, with the bases' outer products one by one."""
    base = {name: tensor.double().numpy() for name, tensor in model().module.state_dict().items() if name in NAMES}
    vectors = [{name: state[name].double().numpy() - base[name] for name in NAMES} for state in states(4)]

    def norm(vector):
        return math.sqrt(sum(float((v**2).sum()) for v in vector.values()))

    current, scale, norms = vectors[0], 1.0, [norm(vectors[0])]
    for vector in vectors[1:]:
        norms.append(norm(vector))
        total = {}
        for name in NAMES:
            new = vector[name]
            if name in ("fc1.weight", "fc2.weight"):
                u, s, vt = np.linalg.svd(current[name], full_matrices=True)
                rank, part = 0, 0.0
                for value in s:
                    part += value
                    if part > share * s.sum():
                        break
                    rank += 1
                kept = np.zeros_like(new)
                for i in range(u.shape[1]):
                    for j in range(vt.shape[0]):
                        if i != j and not (i < rank and j < rank):
                            kept += (u[:, i] @ new @ vt[j]) * np.outer(u[:, i], vt[j])
                new = kept
            total[name] = scale * current[name] + new
        scale = norm(total) / (sum(norms) / len(norms))
        current = {name: value / scale for name, value in total.items()}
    return {name: base[name] + current[name] for name in NAMES}


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_opcm(share):
    found, wanted = merged(Opcm(share=share), states(4)), opcm_by_hand(share)
    for name in NAMES:
        np.testing.assert_allclose(found[name].numpy(), wanted[name], atol=1e-5)
    other = opcm_by_hand(0.0 if share == 0.9 else 0.9)
    assert max(np.abs(found[name].numpy() - other[name]).max() for name in NAMES) > 1e-3


def test_what_is_added_is_orthogonal_to_what_was_merged():
    task, before = torch.randn(2, 12, 7).unbind()
    added = project_away(task, before, 0.5)
    assert abs(float((added * before).sum())) < 1e-4
    u, s, vt = torch.linalg.svd(before)
    largest = int((s.cumsum(0) <= 0.5 * s.sum()).sum())
    assert largest
    assert float((u[:, :largest].T @ added @ vt[:largest].T).abs().max()) < 1e-4
    assert float((task * before).sum().abs()) > 0.1, "the task vector itself isn't orthogonal"


def test_memory_does_not_grow_with_the_number_of_models():
    """Of every state that was read, at most one is alive."""
    import weakref

    alive: list[weakref.ref] = []
    most = [0]

    def read() -> dict[str, Tensor]:
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        state = {name: tensor.clone() for name, tensor in states(1)[0].items()}
        alive.append(weakref.ref(state["fc1.weight"]))
        return state

    context = Context(finetunes=tuple(Finetune(name=str(i), read=read) for i in range(8)))
    for technique in (Opcm(), Soup(), TaskArithmetic(), Dare()):
        pipeline.run(model(), Recipe((technique,)), context)
    assert most[0] <= 1


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (lambda: Ties(trim_ratio=1.0), "ties: trim_ratio is 1.0; it can be 0, or more and less than 1"),
        (lambda: Ties(scale=0), "ties: scale is 0; it has to be more than 0"),
        (lambda: Dare(drop_ratio=-0.1), "dare: drop_ratio is -0.1"),
        (lambda: Dare(scale=-1), "dare: scale is -1"),
        (lambda: TaskArithmetic(scale=0), "task_arithmetic: scale is 0"),
        (lambda: Opcm(share=1.0), "opcm: share is 1.0"),
        (lambda: Fisher(draws=-1), "fisher: draws is -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(technique, message):
    with pytest.raises(RecipeError, match=message):
        technique()


def test_without_anything_to_merge_it_is_refused():
    with pytest.raises(
        RecipeError, match="soup merges fine-tunes of the model, and there are none; see: martlet merge"
    ):
        pipeline.run(model(), Recipe((Soup(),)), Context())
