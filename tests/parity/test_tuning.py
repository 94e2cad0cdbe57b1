"""Few weights are learned, and only those; low-rank updates merge into plain weights; no gradient goes by a ladder."""

import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from colors import colors
from martlet.core import pipeline, registry, store
from martlet.core.errors import RecipeError, UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.engine.torch import Torch
from martlet.graph.trace import trace
from martlet.nn.side import Bottleneck, Prompted, Rung, Tier
from martlet.source import load_model
from martlet.techniques.tune.ladder import Ladder
from martlet.techniques.tune.lora import Lora
from martlet.techniques.tune.lora_ga import LoraGa
from martlet.techniques.tune.vpt import Vpt

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
QUICK = {"epochs": 2, "batch": 16, "rate": 1e-2, "augment": "none"}


def vit(seed: int = 1, **kwargs) -> Model:
    preprocess = {"size": (16, 16), "resize": 16}
    return load_model(
        "timm:vit_tiny_patch16_224", model_kwargs=TINY | kwargs, num_classes=3, preprocess=preprocess, seed=seed
    )


def examples(n: int = 48) -> Examples:
    return colors(vit().preprocess, n)


def tuned(technique, model: Model | None = None) -> Model:
    return pipeline.run(model or vit(), Recipe((technique,)), Context(training=examples(), seed=4))


def changed(before: Model, after: Model) -> set[str]:
    a, b = before.module.state_dict(), after.module.state_dict()
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("probe", lambda n: n.startswith("head.")),
        ("bitfit", lambda n: n.startswith("head.") or n.endswith("bias")),
        (
            "lora",
            lambda n: n.startswith("head.") or (n.startswith("blocks") and n.endswith("weight") and "norm" not in n),
        ),
    ],
)
def test_only_what_is_meant_is_learned(name, learned):
    model = vit()
    done = tuned(registry.technique(name)(**QUICK), model)
    assert changed(model, done) == {n for n, _ in model.module.named_parameters() if learned(n)}
    assert {type(m) for m in done.module.modules()} == {type(m) for m in model.module.modules()}


@pytest.mark.parametrize("technique", [Lora(rank=2, alpha=4.0, **QUICK), LoraGa(rank=2, alpha=4.0, **QUICK)])
def test_updates_are_of_low_rank_and_merged_into_plain_weights(technique):
    model = vit()
    done = tuned(technique, model)
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        update = done.module.get_submodule(name).weight - model.module.get_submodule(name).weight
        values = torch.linalg.svdvals(update.detach())
        rank = 2 if isinstance(technique, Lora) else 4  # the product that was taken off, and the one that was learned
        assert values[rank] < 1e-5 * values[0]
        assert values[rank - 1] > 1e-4 * values[0]
    assert not any("lora" in name for name, _ in done.module.named_modules())
    assert not hasattr(done.module, "peft_config")


def test_lora_is_the_papers(monkeypatch):
    """y = W x + alpha / r B A x, with B zero at first, by hand on one Linear."""
    seen = {}
    merge = sys.modules["martlet.training.low_rank"].LowRank.finish_

    def look(self, student: nn.Module) -> None:
        layer = student.get_submodule("blocks.0.mlp.fc1")
        seen["a"], seen["b"] = (
            getattr(layer, name)["default"].weight.detach().clone() for name in ("lora_A", "lora_B")
        )
        merge(self, student)

    monkeypatch.setattr(sys.modules["martlet.training.low_rank"].LowRank, "finish_", look)
    model = vit()
    done = tuned(Lora(rank=2, alpha=3.0, **QUICK), model)
    a, b = seen["a"].double().tolist(), seen["b"].double().tolist()
    before, after = (m.module.get_submodule("blocks.0.mlp.fc1").weight.detach() for m in (model, done))
    wanted = [
        [float(before[o, i]) + 3.0 / 2 * sum(b[o][r] * a[r][i] for r in range(2)) for i in range(before.shape[1])]
        for o in range(before.shape[0])
    ]
    torch.testing.assert_close(after, torch.tensor(wanted), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(after, before, atol=1e-4)


def effective_cosine(model: Model, technique) -> float:
    """Of the change of a weight by the first step of gradient descent on the factors with that of the weight itself."""
    found, its = {}, examples()

    class Stop(Exception):
        pass

    def first(objective, student: nn.Module) -> None:
        objective.prepare_(student)
        images = its.normalize(its.pixels)
        functional.cross_entropy(student(images), its.labels).backward()
        layer = student.get_submodule("blocks.0.mlp.fc1")
        a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
        found["step"] = (b.grad @ a + b @ a.grad).detach()
        found["start"] = student.get_submodule("blocks.0.mlp.fc1").scaling["default"] * (b @ a).detach()

    torch.manual_seed(0)
    twin = model.copy()
    context = Context(training=its, seed=4)
    first(technique.objective(twin, context), twin.module)
    whole = model.copy()
    functional.cross_entropy(whole.module(its.normalize(its.pixels)), its.labels).backward()
    gradient = whole.module.get_submodule("blocks.0.mlp.fc1").weight.grad
    images = its.normalize(its.pixels)
    with torch.no_grad():
        torch.testing.assert_close(twin.module(images), model.module(images), rtol=1e-3, atol=1e-4)
    return float(functional.cosine_similarity(found["step"].flatten(), gradient.flatten(), 0))


def test_the_first_step_of_lora_ga_is_nearer_to_that_of_all_weights():
    model = vit()
    ours, plain = (effective_cosine(model, t(rank=2, images=48) if t is LoraGa else t(rank=2)) for t in (LoraGa, Lora))
    assert ours > plain + 0.1
    assert ours > 0.8


LAYERS = {"adapter": Bottleneck, "vpt": Prompted, "ladder": Rung, "sherl": Tier}
NARROWER = {"ladder": {"narrower": 4}, "sherl": {"narrower": 4}}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_put_in_begins_as_nothing_learns_alone_and_reloads(name, tmp_path):
    settings = NARROWER.get(name, {})
    model = vit()
    done = tuned(registry.technique(name)(**QUICK, **settings), model)
    layers = [m for m in done.module.modules() if isinstance(m, LAYERS[name])]
    assert len(layers) == (1 if name == "sherl" else 2)
    before = {k: v for k, v in model.module.state_dict().items() if not k.startswith("head.")}
    after = {k.replace(".inner", ""): v for k, v in done.module.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items()), "what was there stays bit for bit"
    assert not torch.equal(done.module.state_dict()["head.weight"], model.module.state_dict()["head.weight"])
    x = examples().normalize(examples().pixels)
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    again = store.load(tmp_path / "out").model()
    fresh = tuned(registry.technique(name)(**{**QUICK, "rate": 1e-12}, weight_decay=0.0, **settings), model)
    with torch.no_grad():
        assert torch.equal(again.module(x), done.module(x))
        if name != "vpt":  # whose tokens are seen from the start
            torch.testing.assert_close(fresh.module(x), model.module(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match=f"{name}: .* has such layers already"):
        tuned(registry.technique(name)(**QUICK, **settings), again)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_put_in_is_traced_for_any_batch(name):
    model = vit()
    registry.technique(name)(**NARROWER.get(name, {}))._put_in_(model)
    for module in model.module.modules():
        if isinstance(module, Bottleneck | Rung | Tier):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.1)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(trace(model.module, (16, 16))(images), model.module(images), rtol=1e-4, atol=1e-5)


def by_hand_bottleneck(layer: Bottleneck, y: list[float]) -> list[float]:
    down = [sum(w * v for w, v in zip(ws, y, strict=True)) + b for ws, b in weights(layer.down)]
    bent = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in down]
    return [
        v + sum(w * u for w, u in zip(ws, bent, strict=True)) + b
        for v, (ws, b) in zip(y, weights(layer.up), strict=True)
    ]


def weights(linear: nn.Linear) -> list[tuple[list[float], float]]:
    return list(zip(linear.weight.double().tolist(), linear.bias.double().tolist(), strict=True))


def test_a_bottleneck_is_the_papers():
    layer = Bottleneck(nn.Identity(), 6, 3)
    nn.init.normal_(layer.up.weight)
    y = torch.randn(6)
    assert layer(y).tolist() == pytest.approx(by_hand_bottleneck(layer, y.tolist()), rel=1e-5, abs=1e-6)


def test_prompts_stand_behind_the_class_token_and_are_gone_after():
    class Notes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return 2 * x

    layer = Prompted(Notes(), 4, 3, 1)
    x = torch.randn(2, 5, 4)
    y = layer(x)
    assert torch.equal(y, 2 * x)
    assert torch.equal(layer.inner.seen[:, 1:4], layer.prompts.expand(2, -1, -1))
    assert torch.equal(layer.inner.seen[:, 0], x[:, 0])
    assert torch.equal(layer.inner.seen[:, 4:], x[:, 1:])


def test_a_ladder_is_the_papers():
    """s_i = block_i(g down_i(y_i) + (1 - g) s_(i-1)), and y + up(s) at the end, rung by rung."""
    torch.manual_seed(3)
    blocks = [nn.Linear(8, 8), nn.Linear(8, 8)]
    rungs = [Rung(b, 8, 4, 2, i == 0, i == 1).eval() for i, b in enumerate(blocks)]
    nn.init.normal_(rungs[1].leave.weight)
    for rung in rungs:
        nn.init.normal_(rung.gate, std=0.1)
    x = torch.randn(2, 5, 8)
    found = rungs[1](rungs[0](x))
    y, s = x, rungs[0].enter(x)
    for block, rung in zip(blocks, rungs, strict=True):
        y = block(y)
        gate = 1 / (1 + math.exp(-rung.gate.item() / 0.1))
        s = rung.block(gate * rung.down(y) + (1 - gate) * s)
    torch.testing.assert_close(found, y + rungs[1].leave(s))
    assert not torch.allclose(found, y, atol=1e-3)


def test_no_gradient_reaches_what_the_ladder_stands_beside():
    model = vit()
    done = tuned(Ladder(narrower=4, **QUICK), model)
    for parameter_name, parameter in done.module.named_parameters():  # as in the loop
        parameter.requires_grad_("blocks" in parameter_name and ".inner." not in parameter_name)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[-1]) or t, lambda t: t):
        done.module(torch.randn(2, 3, 16, 16)).sum().backward()
    reached = {name for name, p in done.module.named_parameters() if p.grad is not None}
    assert not any(".inner." in name for name in reached)
    assert any("blocks.0.block" in name for name in reached)
    assert 32 * 4 not in kept, "no activation inside the model's MLPs is kept"
    plain = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: plain.append(t.shape[-1]) or t, lambda t: t):
        model.module(torch.randn(2, 3, 16, 16))
    assert 32 * 4 in plain


def test_prompts_of_another_task_are_where_it_begins(tmp_path):
    first = tuned(Vpt(prompts=3, **QUICK))
    with store.writing(tmp_path / "first") as folder:
        store.seal(folder, first, "torch", store.write_model(folder, first, Torch()))
    technique = Vpt(prompts=3, start=str(tmp_path / "first"), **{**QUICK, "rate": 1e-12}, weight_decay=0.0)
    done = tuned(technique, vit(seed=7))
    for a, b in zip(first.module.blocks, done.module.blocks, strict=True):
        torch.testing.assert_close(a.prompts, b.prompts)
    with pytest.raises(
        RecipeError, match=r"has the prompts \(3, 32\), \(3, 32\), and .* takes 2 of \(4, 32\), by block"
    ):
        tuned(Vpt(prompts=4, start=str(tmp_path / "first"), **QUICK))
    with pytest.raises(UsageError, match="nowhere is no artifact"):
        tuned(Vpt(start=str(tmp_path / "nowhere"), **QUICK))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lora(rank=0), "lora: rank is 0"),
        (lambda: LoraGa(gamma=0), "lora_ga: gamma is 0"),
        (lambda: tuned(LoraGa(rank=32)), "has 32 features and takes 64 directions; set rank: 16"),
        (lambda: tuned(Ladder(narrower=5)), "32 features in 2 heads, .* doesn't fit; narrower can be 1, 2, 4, 8, 16"),
        (lambda: registry.technique("adapter")(width=0), "adapter: width is 0"),
        (lambda: Vpt(prompts=0), "vpt: prompts is 0"),
    ],
)
def test_what_can_not_be_is_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"lora needs peft: pip install 'martlet\[tune\]'"):
        tuned(Lora(**QUICK))
