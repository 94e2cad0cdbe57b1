"""light_peft's masks and what its updates tell are the official code's, by hand; and what it cuts is really gone."""

import pytest
import torch
from torch import Tensor, nn

from colors import colors
from martlet.core import pipeline, store
from martlet.core.errors import RecipeError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.engine.torch import Torch
from martlet.measure.macs import macs
from martlet.source import load_model
from martlet.techniques.tune import light_peft
from martlet.techniques.tune.light_peft import LightPeft, cuts
from martlet.training import loop
from martlet.training.early import Early, best
from martlet.training.low_rank import LowRank
from martlet.training.objective import Batch
from martlet.vit.repair import cut_
from martlet.vit.view import view

QUICK = {"epochs": 4, "batch": 16, "rate": 1e-2, "augment": "none"}
HEADS, DIM, HIDDEN = 4, 8, 64


def source() -> Model:
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": HEADS * DIM, "depth": 2, "num_heads": HEADS, "mlp_ratio": 2}
    preprocess = {"size": (16, 16), "resize": 16}
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=tiny, num_classes=3, preprocess=preprocess, seed=1)


def examples(n: int = 48) -> Examples:
    return colors(source().preprocess, n)


def batch_of(data: Examples, step: int, steps: int = 10) -> Batch:
    images = data.normalize(data.pixels)
    return Batch(images=images, labels=data.labels, indices=None, seeds=None, step=step, steps=steps)  # type: ignore[arg-type]


def early(model: Model, sparsity: float = 1e-4, module_ratio: float = 0.5, rank_ratio: float = 0.5) -> Early:
    """Begun, its updates and masks drawn."""
    torch.manual_seed(5)
    objective = Early(0.0, ["head"], LightPeft(rank=4).config(model), sparsity, module_ratio, rank_ratio)
    objective.prepare_(model.module)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        for mask in (*objective.head_masks, *objective.unit_masks):
            mask.uniform_(0.2, 1.5)
    return objective


def test_what_updates_tell_is_the_official_codes():
    """Of an update, the norm of what it gives over that of what it is added to; of a rank, weights times gradients."""
    model, data = source(), examples(12)
    objective, inputs, outputs = early(model, sparsity=0.01), [], []
    layer = model.module.get_submodule("blocks.1.mlp.fc1")

    def look(_module: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> None:
        inputs.append(x[0].detach())
        outputs.append(y.detach())

    layer.register_forward_hook(look)
    for step in (0, 4, 5, 6):  # the first two are in the first half
        model.module.zero_grad()
        objective.loss(model.module, batch_of(data, step)).backward()
        assert not objective.climb_([])
    i = [*objective._layers].index("blocks.1.mlp.fc1")
    base = layer.get_base_layer()(inputs[0]).detach()
    tokens = [
        float((y - b).norm() / b.norm()) for y, b in zip(outputs[0].flatten(0, 1), base.flatten(0, 1), strict=True)
    ]
    assert float(objective.updates[i]) == pytest.approx(2 * sum(tokens) / len(tokens), rel=1e-3)
    down, up = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    wanted = []
    for r in range(4):
        total = 0.0
        for weight, slope in ((down[r], down.grad[r]), (up[:, r], up.grad[:, r])):
            pairs = zip(weight.tolist(), slope.tolist(), strict=True)
            total += abs(sum(w * g for w, g in pairs)) / len(slope)
        wanted.append(2 * total)
    assert objective.ranks[i].tolist() == pytest.approx(wanted, rel=1e-3)


def test_the_penalty_is_the_sum_of_all_masks_and_they_have_rates_of_their_own():
    model, data = source(), examples(12)
    objective = early(model, sparsity=0.01)
    with torch.no_grad():
        ours = float(objective.loss(model.module, batch_of(data, 0)))
        plain = float(LowRank.loss(objective, model.module, batch_of(data, 0)))
    masks = [v for mask in (*objective.head_masks, *objective.unit_masks) for v in mask.tolist()]
    assert len(masks) == 2 * (HEADS + HIDDEN)
    assert ours - plain == pytest.approx(0.01 * sum(map(abs, masks)), rel=1e-4)
    rates = {len(g["params"][0]): g.get("rate_scale", 1.0) for g in objective.groups(model.module, 0.0)[-2:]}
    assert rates == {HEADS: 100.0, HIDDEN: 50.0}


@torch.no_grad()
def test_masks_become_weights_and_what_they_mask_is_gone():
    """A head or unit whose mask is zero can be cut without a change; one whose mask isn't can't."""
    model, data = source(), examples(8)
    x = data.normalize(data.pixels)
    objective = early(model, module_ratio=0.0, rank_ratio=0.0)
    for heads, units in zip(objective.head_masks, objective.unit_masks, strict=True):
        heads[[0, 3]], units[: HIDDEN // 2] = 0, 0
    masked = model.module.eval()(x)
    objective.finish_(model.module)
    torch.testing.assert_close(model.module(x), masked, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in model.module.named_modules())
    wrong, vit = model.copy(), view(model.module)
    found = cuts(vit, [*objective.head_masks], [*objective.unit_masks], 0.5, 8)
    assert [cut.heads.tolist() for cut in found.values()] == [[1, 2]] * 2
    assert [cut.hidden.tolist() for cut in found.values()] == [list(range(HIDDEN // 2, HIDDEN))] * 2
    cut_(model.module, found)
    torch.testing.assert_close(model.module(x), masked, rtol=1e-4, atol=1e-5)
    flipped = [1 - mask for mask in objective.head_masks]
    cut_(wrong.module, cuts(view(wrong.module), flipped, [*objective.unit_masks], 0.5, 8))
    assert not torch.allclose(wrong.module(x), masked, rtol=1e-2, atol=1e-2)


def test_units_are_compared_in_all_blocks_and_heads_in_each():
    vit = view(source().module)
    heads = [torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([9.0, 8.0, 7.0, 6.0])]
    units = [torch.linspace(0, 1, HIDDEN), torch.linspace(0.75, 1.75, HIDDEN)]
    found = cuts(vit, heads, units, 0.5, 8)
    assert [cut.heads.tolist() for cut in found.values()] == [[2, 3], [0, 1]]
    everything = sorted(units[0].tolist() + units[1].tolist())[HIDDEN:]
    above = [sum(v >= everything[0] for v in mask.tolist()) for mask in units]
    assert [cut.shape.hidden for cut in found.values()] == [max(round(n / 8), 1) * 8 for n in above]
    assert found[0].shape.hidden < found[1].shape.hidden
    nothing = cuts(vit, heads, units, 0.0, 7)
    assert nothing == {}


@torch.no_grad()
def test_updates_and_ranks_that_are_dropped_add_nothing():
    model = source()
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    objective = early(model)
    for mask in (*objective.head_masks, *objective.unit_masks):
        mask.fill_(1)
    objective.updates.copy_(torch.arange(8.0))  # qkv, proj, fc1 and fc2 of both blocks
    objective.ranks.copy_(torch.arange(32.0).view(8, 4) % 7)
    names = [*objective._layers]
    objective.finish_(model.module)
    assert {*objective.kept} <= {*names[4:]}
    assert sum(objective.kept.values()) == 8, "half of the ranks of half of the updates"
    for name in names:
        change = model.module.get_submodule(name).weight - before[f"{name}.weight"]
        assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == objective.kept.get(name, 0), name


def test_best_leaves_one_at_least():
    assert best(torch.tensor([3.0, 1.0, 2.0]), 0.34).tolist() == [0, 2]
    assert best(torch.tensor([3.0, 1.0]), 0.99).tolist() == [0]


def tuned(technique: LightPeft, **more) -> Model:
    return pipeline.run(source(), Recipe((technique,)), Context(training=examples(), seed=4, **more))


def test_it_is_smaller_learns_fewer_and_reloads(tmp_path, monkeypatch):
    learned, groups = [], LowRank.groups

    def count(self: LowRank, student: nn.Module, weight_decay: float) -> list[dict]:
        names = {id(p): name for name, p in student.named_parameters()}
        found = groups(self, student, weight_decay)
        learned.append(sum(p.numel() for g in found for p in g["params"] if "lora_" in names[id(p)]))
        return found

    monkeypatch.setattr(LowRank, "groups", count)
    model, done = source(), tuned(LightPeft(early=0.5, prune_ratio=0.5, rank=4, **QUICK))
    assert learned[1] <= 0.25 * learned[0], "learned beside the classifier"
    assert macs(done) < 0.65 * macs(model)
    assert sum(p.numel() for p in done.module.blocks.parameters()) < 0.55 * sum(
        p.numel() for p in model.module.blocks.parameters()
    )
    record = done.steps[0].record
    assert record["early"]["steps"] == record["steps"] == 6
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    data = examples()
    x = data.normalize(data.pixels)
    with torch.no_grad():
        logits = done.module(x)
        assert torch.equal(store.load(tmp_path / "out").model().module(x), logits)
    assert float((logits.argmax(1) == data.labels).float().mean()) > 0.8


def test_what_is_left_is_refitted_to_what_the_whole_model_gave(monkeypatch):
    whole, data = source(), examples()
    images = data.normalize(data.pixels)
    still = LightPeft(rank=4, prune_ratio=0.5, **QUICK | {"rate": 1e-9, "warmup": 0.0})
    context = Context(training=data, seed=0)
    repaired = pipeline.run(whole, Recipe((still,)), context)
    monkeypatch.setattr(light_peft, "cut_and_repair_", lambda module, cuts, images, progress: cut_(module, cuts))
    plain = pipeline.run(whole, Recipe((still,)), context)
    with torch.no_grad():
        off, off_plain = ((its.module(images) - whole.module(images)).norm() for its in (repaired, plain))
    assert off < off_plain / 2


@pytest.mark.slow
def test_three_maps_that_become_one_learn_as_one():
    """Of a library whose q, k and v are apart."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
            self.model = transformers.ViTForImageClassification(config)

        def forward(self, images: Tensor) -> Tensor:
            return self.model(pixel_values=images).logits

    model = Model(name="hf", module=Logits(), preprocess=source().preprocess, num_classes=3, origin={})
    technique = LightPeft(early=0.5, prune_ratio=0.5, module_ratio=0.0, rank_ratio=0.0, rank=4, **QUICK)
    done = pipeline.run(model, Recipe((technique,)), Context(training=examples(), seed=4))
    ranks = done.steps[0].record["ranks"]
    fused = [view(done.module).blocks[i].attention.query.name for i in (0, 1)]
    assert {*fused} <= {*ranks}
    assert len(ranks) == 2 * 4
    assert view(done.module).blocks[0].attention.num_heads == 2


class Halt(Exception):
    pass


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_stopped_before_or_after_the_cut_it_goes_on_to_the_same_weights(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    technique, steps = LightPeft(early=0.5, rank=4, **QUICK), []

    def halt(what: str, done: int, total: int) -> None:
        if what.startswith("train, loss"):
            steps.append(done)
            if len(steps) == stop:
                raise Halt

    def weights(**more) -> list[Tensor]:
        return [*tuned(technique, **more).module.parameters()]

    kept = Kept(tmp_path)
    with pytest.raises(Halt):
        weights(kept=kept, progress=halt)
    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(kept=kept), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early": 1.0}, "light_peft: early is 1.0; it can be more than 0 and less than 1"),
        ({"rank_ratio": 1.0}, "light_peft: rank_ratio is 1.0; it is from 0 to less than 1"),
        ({"sparsity": -1.0}, "light_peft: sparsity is -1.0"),
        ({"multiple": 0}, "light_peft: multiple is 0"),
        ({"rank": 0}, "light_peft: rank is 0"),
    ],
)
def test_what_can_not_be_is_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        LightPeft(**settings)
