"""pyra's merges are the paper's on an oracle of one token at a time; merging nothing it is lora; and it reloads."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from token_oracle import Choose, Token, images, logits_by_hand, mean, vit
from torch import Tensor, nn

from colors import colors
from martlet.core import pipeline, store
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.data.preprocess import Preprocess
from martlet.engine.torch import Torch
from martlet.graph.trace import trace
from martlet.nn.reactivation import Reactivation
from martlet.source import load_model
from martlet.techniques.tokens.evit import EViT
from martlet.techniques.tokens.tome import ToMe
from martlet.techniques.tune.lora import Lora
from martlet.techniques.tune.pyra import Pyra

SCHEDULE = {0: 4, 2: 3, 3: 2}
QUICK = {"epochs": 2, "batch": 16, "rate": 1e-2, "augment": "none"}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def reactivated(layer: Reactivation, k: int, pairs: list[tuple[Token, Token]]) -> Token:
    """The k-th of the tokens that join others, from all such pairs of a token and whom it joins."""
    information = [layer.norm(s * x + t * y) for (s, x), (t, y) in pairs]
    by_channel = [
        2 * sigmoid(sum(float(w) * float(z[c]) for w, z in zip(layer.tokens, information, strict=True)))
        for c in range(len(layer.channels))
    ]
    by_token = 2 * sigmoid(float(information[k] @ layer.channels)) - 1
    size, x = pairs[k][0]
    return size, torch.stack([v + v * by_channel[c] * by_token for c, v in enumerate(x)])


def merging(r: int, layer: Reactivation, backwards: bool = False, sized: bool = True) -> Choose:
    """backwards: pairs in the other order. sized: with the sizes of tokens in what is known of a pair."""

    def choose(tokens: list[Token], keys: list[Tensor], seen: list[list[float]], before: list[Tensor]) -> list[Token]:
        destinations = [t for t in range(1, len(tokens)) if t % 2]
        sources = [t for t in range(1, len(tokens)) if t % 2 == 0]
        edges = []
        for s in sources:
            alike = [float(torch.cosine_similarity(keys[s].mean(0), keys[d].mean(0), dim=0)) for d in destinations]
            best = max(range(len(destinations)), key=alike.__getitem__)
            edges.append((alike[best], s, destinations[best]))
        edges.sort()
        leaving = edges[len(edges) - r :][:: 1 if backwards else -1]
        groups = {t: [tokens[t]] for t in destinations}
        pairs = [(tokens[s], tokens[d]) for _, s, d in leaving]
        if not sized:
            pairs = [((1.0, x), (1.0, y)) for (_, x), (_, y) in pairs]
        for k, (_, s, d) in enumerate(leaving):
            groups[d].append((tokens[s][0], reactivated(layer, k, pairs)[1]))
        return tokens[:1] + [mean(g) for g in groups.values()] + [tokens[s] for _, s, _ in edges[: len(edges) - r]]

    return choose


def merged(module: VisionTransformer, schedule: dict[int, int] = SCHEDULE) -> tuple[Model, dict[int, Reactivation]]:
    """With what pyra puts in, whose parameters are drawn."""
    model = Model(name="vit", module=module, preprocess=Preprocess(size=(40, 24)), num_classes=7, origin={})
    float32 = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        done = pipeline.run(model, Recipe((ToMe(r=schedule),)), Context())
    finally:
        torch.set_default_dtype(float32)
    Pyra()._put_in_(done)
    layers = {i: block.reactivation for i, block in enumerate(done.module.blocks) if hasattr(block, "reactivation")}
    for layer in layers.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
    return done, layers


def test_merges_are_the_papers():
    torch.manual_seed(0)
    model, layers = merged(vit())
    assert [*layers] == [*SCHEDULE]
    with torch.no_grad():
        found = model.module(images())
    torch.manual_seed(0)
    module = vit()
    wanted = logits_by_hand(module, {i: merging(r, layers[i]) for i, r in SCHEDULE.items()}, True)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for fault in ({"backwards": True}, {"sized": False}):
        wrong = logits_by_hand(module, {i: merging(r, layers[i], **fault) for i, r in SCHEDULE.items()}, True)
        assert not torch.allclose(found, wrong, rtol=1e-4, atol=1e-4)


def test_it_is_traced_for_any_batch_and_a_copy_is_changed_by_its_own_layers():
    model, _ = merged(vit(depth=2), {0: 4, 1: 3})
    model.module.float()
    x = torch.randn(3, 3, 40, 24)
    twin = model.copy()
    with torch.no_grad():
        before = model.module(x)
        torch.testing.assert_close(trace(model.module, (40, 24))(x), before, rtol=1e-4, atol=1e-4)
        for parameter in twin.module.blocks[0].reactivation.parameters():
            parameter.zero_()
        assert torch.equal(model.module(x), before)
        assert not torch.allclose(twin.module(x), before, atol=1e-4)


def source() -> Model:
    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    preprocess = {"size": (16, 16), "resize": 16}
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=tiny, num_classes=3, preprocess=preprocess, seed=1)


def examples(n: int = 48) -> Examples:
    return colors(source().preprocess, n)


def tuned(*passes) -> Model:
    return pipeline.run(source(), Recipe(passes), Context(training=examples(), seed=4))


def test_where_nothing_is_merged_it_is_lora_to_the_bit():
    ours, plain = tuned(ToMe(r=0), Pyra(**QUICK)), tuned(ToMe(r=0), Lora(**QUICK))
    a, b = ours.module.state_dict(), plain.module.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["blocks.0.attn.qkv.weight"], source().module.state_dict()["blocks.0.attn.qkv.weight"])


def test_it_learns_updates_and_layers_alone_and_reloads(tmp_path):
    before = tuned(ToMe(r={0: 6}))
    done = tuned(ToMe(r={0: 6}), Pyra(**QUICK))
    was, now = before.module.state_dict(), done.module.state_dict()
    changed = {name for name in was if not torch.equal(was[name], now[name])}
    wanted = {n for n in was if n.endswith("weight") and n.startswith("blocks") and "norm" not in n}
    assert changed == wanted | {"head.weight", "head.bias"}
    added = {name.removeprefix("blocks.0.") for name in now.keys() - was.keys()}
    assert added == {f"reactivation.{n}" for n in ("norm.weight", "norm.bias", "tokens", "channels")}
    assert float(now["blocks.0.reactivation.channels"].abs().max()) > 1e-3
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    x = examples().normalize(examples().pixels)
    with torch.no_grad():
        assert torch.equal(store.load(tmp_path / "out").model().module(x), done.module(x))


def test_it_begins_as_merging_alone():
    merging_alone, begun = tuned(ToMe(r={0: 6})), tuned(ToMe(r={0: 6}))
    Pyra()._put_in_(begun)
    x = examples().normalize(examples().pixels)
    with torch.no_grad():
        assert torch.equal(begun.module(x), merging_alone.module(x))


def test_updates_of_attention_that_merging_took_over_are_learned():
    """By lora too, for any reduction of tokens."""
    for first in (ToMe(r={0: 6}), EViT(r={0: 6})):
        before, done = tuned(first), tuned(first, Lora(**QUICK))
        for name in ("attn.qkv", "attn.proj", "mlp.fc1"):
            for block in (0, 1):
                was, now = (m.module.get_submodule(f"blocks.{block}.{name}").weight for m in (before, done))
                assert not torch.equal(was, now), (first.name, block, name)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((Pyra(),), "pyra: nothing of timm:vit_tiny.* is merged yet; put what merges pairs of tokens before it"),
        ((EViT(), Pyra()), "pyra: nothing of timm:vit_tiny.* is merged yet"),
        ((ToMe(r={0: 6}), Pyra(**QUICK), Pyra()), "pyra: timm:vit_tiny.* has such layers already; `lora` trains on"),
    ],
)
def test_what_can_not_be_is_refused(passes, message):
    with pytest.raises(RecipeError, match=message):
        tuned(*passes)


def test_a_rank_of_none_is_refused():
    with pytest.raises(RecipeError, match="pyra: rank is 0"):
        Pyra(rank=0)
