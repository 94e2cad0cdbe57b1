"""Exits on a latent code against plain Python in float64: what is read, written and thought at each, what is learned;
that a fault would show.

Han et al., Dynamic Perceiver, 2023, arXiv 2306.11248, and facts of its code. Attention and pooling have their oracle in
tests/unit/models/test_dyn_perceiver.py.
"""

import math

import numpy as np
import pytest
import torch

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.engine.torch import Torch
from martlet.graph.stages import run, stages
from martlet.source import load_model
from martlet.techniques.exits.dyn_perceiver import ALIKE, EARLY, HOST_RATE, DynPerceiver, Together, cells
from martlet.training.objective import RATE, Batch, Teacher
from martlet.vit.exits import places
from martlet.vit.view import view

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
HOSTS = {"vit": ("timm:vit_tiny_patch16_224", VIT), "swin": ("timm:swin_tiny_patch4_window7_224", SWIN)}
SETTINGS = {"tokens": 8, "epochs": 1.0, "batch": 16}


class Noise:
    """Calibration images."""

    num_images = 32

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(16, 3, self.size, self.size, generator=generator)


def host(kind: str, **more: int):
    name, kwargs = HOSTS[kind]
    return load_model(name, model_kwargs=kwargs | more, num_classes=10, seed=3)


def applied(model, epochs: float = 1.0, **settings):
    technique = DynPerceiver(**SETTINGS | {"epochs": epochs} | settings)
    images = Noise(model.preprocess.size[0])
    training = Examples.unlabelled(images, model.preprocess)
    training.labels = torch.arange(len(training)) % model.num_classes
    return pipeline.run(model, Recipe((technique,)), Context(images=images, training=training, seed=1))


@pytest.fixture(scope="module", params=HOSTS)
def pair(request):
    source = host(request.param)
    return source, applied(source)


def untrained(source, **settings):
    model, technique = source.copy(), DynPerceiver(**SETTINGS | settings)
    vit = view(model.module)
    technique.restore_(model, technique.plan(model, vit, places("", technique.after, len(vit.blocks))))
    return model


def randomized(model, seed: int = 1, std: float = 0.3):
    """In float64, with branches that have something to say."""
    twin = model.copy()
    generator = torch.Generator().manual_seed(seed)
    for parameter in [*twin.module.latent.parameters(), *twin.module.exits.parameters()]:
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    twin.module.double()
    return twin


@torch.no_grad()
def oracle(module, images):
    """The whole from parts: blocks one by one, and at each reading what the paper's figure says, in its order."""
    run_, branch = module.exit_run, module.latent
    seen = []
    hooks = [b.register_forward_pre_hook(lambda _, args, i=i: at(i, args)) for i, b in enumerate(run_.blocks)]
    code = exits = None

    def at(i, args):
        nonlocal code, exits
        x = args[0]
        if i == 0:
            code, exits = branch.code.repeat(len(x), 1, 1), []
        else:
            mixed = torch.stack([branch.shrink[i - 1].mix(code[..., c]) for c in range(code.shape[-1])], -1)
            code = branch.shrink[i - 1].expand(mixed)
            written = branch.write[i - 1](x.reshape(len(x), -1, x.shape[-1]), code)
            x = written.reshape(x.shape)
        patches = x.reshape(len(x), -1, x.shape[-1])[:, run_.readouts[i].num_prefix :]
        down, across = run_.readouts[i].grid
        image = torch.empty(len(x), x.shape[-1], down, across, dtype=x.dtype)
        for r in range(down):
            for c in range(across):
                image[:, :, r, c] = patches[:, r * across + c]
        code = branch.read[i](code, image)
        if i:
            thought = sum(code[:, n] for n in range(code.shape[1])) / code.shape[1]
            if i > 1:
                thought = torch.cat([thought, branch.transfer[i - 2](exits[-1])], 1)
            exits.append(module.exits[i - 1].head(thought))
            seen.append(code)
        return (x, *args[1:])

    try:
        own = type(module).forward(module, images)
    finally:
        for hook in hooks:
            hook.remove()
    thought = torch.cat([code.mean(1), branch.transfer[-1](exits[-1])], 1)
    last = own + branch.fc(branch.norm(thought))
    return exits, own, last


def images_of(model, count: int = 3):
    return torch.randn(count, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(9))


def test_logits_are_those_of_the_parts(pair):
    model = randomized(pair[1])
    images = images_of(model).double()
    exits, own, last = oracle(model.module, images)
    with torch.no_grad():
        _, found, ours, final = model.module.exit_run.outputs(images)
        assert torch.allclose(model.module(images), last)
    for a, b in zip((*found, ours, final), (*exits, own, last), strict=True):
        assert torch.allclose(a, b)
    assert not torch.allclose(own, last, atol=1e-3)


def test_features_read_the_code_and_the_code_the_features(pair):
    """Without writing, or without what the exit before thought, the oracle finds something else."""
    model = randomized(pair[1])
    images = images_of(model).double()
    with torch.no_grad():
        _, exits, own, _ = model.module.exit_run.outputs(images)
        for part in (model.module.latent.write[-1].proj, model.module.latent.write[-1].mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
        _, without, deaf, _ = model.module.exit_run.outputs(images)
    assert torch.equal(exits[0], without[0])  # it comes before
    assert not torch.allclose(exits[-1], without[-1], atol=1e-4)
    assert not torch.allclose(own, deaf, atol=1e-4)


def test_training_begins_with_the_untouched_model():
    source = host("vit")
    model, images = untrained(source), images_of(source)
    with torch.no_grad():
        assert torch.equal(model.module(images), source.module(images))


def test_the_loss_is_the_papers():
    source = host("vit")
    model = randomized(applied(source), seed=2)
    teacher = source.copy()
    teacher.module.double()
    images, labels = images_of(model, 4).double(), torch.tensor([1, 5, 0, 9])
    exits, own, last = oracle(model.module, images)
    exits, own, last = [each.tolist() for each in exits], own.tolist(), last.tolist()

    def logs(row):
        top = max(row)
        return [v - top - math.log(sum(math.exp(w - top) for w in row)) for v in row]

    def cross(rows):
        return -sum(logs(row)[label] for row, label in zip(rows, labels.tolist(), strict=True)) / len(rows)

    def kl(rows):
        total = 0.0
        for row, aim in zip(rows, last, strict=True):
            total += sum(math.exp(q) * (q - p) for p, q in zip(logs(row), logs(aim), strict=True))
        return total / len(rows)

    wanted = cross(own) + cross(last) + EARLY * sum(map(cross, exits)) + ALIKE * sum(map(kl, [*exits, own]))
    batch = Batch(images=images, labels=labels, indices=np.arange(4), seeds=np.arange(4), step=0, steps=1)
    found = Together(0.0, Teacher(teacher, source)).loss(model.module, batch)
    found = found.item()
    assert found == pytest.approx(wanted, rel=1e-5)  # cross-entropies are computed in float32
    assert found != pytest.approx(wanted - ALIKE * kl(own), rel=1e-5)


def test_without_labels_the_untouched_model_is_learned():
    source = host("vit")
    images = images_of(source, 4)
    batch = Batch(images=images, labels=None, indices=np.arange(4), seeds=np.arange(4), step=0, steps=1)
    objective = Together(0.1, Teacher(source, source))
    with torch.no_grad():
        p = source.module(images).softmax(1)
        entropy = -(p * p.log()).sum(1).mean()
        assert objective.judge(source.module(images), batch).item() == pytest.approx(entropy.item(), rel=1e-5)


def test_what_is_new_learns_faster(pair):
    module = pair[1].module
    objective = Together(0.0, Teacher(pair[0], pair[0]))
    groups = objective.groups(module, 0.05)
    new = {id(p) for part in (module.latent, module.exits) for p in part.parameters()}
    assert {group[RATE] for group in groups} == {1.0, HOST_RATE}
    assert all((id(p) in new) == (group[RATE] == 1.0) for group in groups for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len([*module.parameters()])


def test_the_whole_model_is_trained(pair):
    source, model = pair
    moved = [
        name
        for name, value in source.module.state_dict().items()
        if not torch.equal(value, model.module.state_dict()[name])
    ]
    assert any(name.startswith(("blocks.", "layers.")) for name in moved)


def cut(source, model):
    """Every stage's logits on some images, as the stages of the graph give them, after comparing all with the whole."""
    images, graph = images_of(source, 5), pipeline.traced(model).module
    windows = [each.window for each in model.module.exits]
    with torch.inference_mode():
        _, logits, _, last = model.module.exit_run.outputs(images)
        found = [next(iter(given.values())) for given in run(stages(graph), images)]  # type: ignore[arg-type]
        for a, b in zip(found, (*logits, last), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        sure = logits[0].softmax(1).amax(1)
        border = float(sure.sort().values[2:4].mean())
        windows[0].copy_(torch.tensor([-math.inf, border]))
        wanted = torch.where((sure >= border)[:, None], logits[0], last)
        assert torch.allclose(graph(images), wanted, atol=1e-5)
    return images, wanted, [0 if each else len(windows) for each in sure >= border]


def test_stages_are_cut_at_the_exits():
    """Each gives what the whole gives; images that leave are gone."""
    source = host("vit", depth=2)
    model = randomized(untrained(source), std=0.1)
    model.module.float()
    _, _, exits = cut(source, model)
    assert {*exits} == {0, 1}  # some leave, and some go on


@pytest.mark.slow
def test_an_artifact_leaves_out_what_is_behind_an_exit(pair, tmp_path):
    model = pair[1].copy()
    images, wanted, exits = cut(pair[0], model)
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, model, "torch", store.write_model(folder, model, Torch()))
    session = store.load(tmp_path / "out").open(batch=5)
    assert np.allclose(session(images.numpy()), wanted.numpy(), atol=1e-5)
    assert session.exits is not None
    assert session.exits.tolist() == exits


@pytest.mark.parametrize(
    ("side", "left"), [(14, 7), (56, 7), (8, 4), (16, 4), (4, 4), (7, 7), (11, 11), (1, 1), (22, 22)]
)
def test_features_are_pooled_where_a_window_fits(side, left):
    assert cells(side) == left


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens is 0; it has to be 1 or more"),
        ({"depth": 0}, "depth is 0; it has to be 1 or more"),
        ({"batch": 1}, "batch is 1; its batch norms need two images or more"),
        ({"tokens": 3}, "tokens is 3, which can't be halved at each of 2 exits; give 4 or more"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(RecipeError, match=f"^dyn_perceiver: {message}$"):
        applied(host("vit"), **settings)
