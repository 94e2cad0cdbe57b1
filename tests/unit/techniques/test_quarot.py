"""quarot on tiny models: logits stay, channels that stand out don't, and what can't be turned is said."""

import pytest
import torch
from tiny import MODELS, Smooth, error, images, logits, model
from torch import nn
from torch.fx import GraphModule

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.graph.sites import aten
from martlet.techniques.quantize.adalog import AdaLog
from martlet.techniques.quantize.quarot import QuaRot

TURNED = {
    "class token": (3, 1),
    "no class token, odd depth": (7, 3),
    "registers and qk-norm": (3, 1),
    "no biases": (0, 1),
    "swin": (3, 3),
}
"""LayerNorms of a stream, and attentions. Four tokens side by side end the first stage of a Swin's stream; and where
Linears have no biases, they can't take a LayerNorm's shift."""


def turned(original: Model) -> Model:
    return pipeline.run(original, Recipe((QuaRot(),)), Context(seed=3))


@pytest.mark.parametrize("kind", MODELS)
def test_logits_stay(kind: str) -> None:
    original, x = model(kind), images()
    done = turned(original)
    record = done.steps[0].record
    assert (record["rotated"]["norms"], record["rotated"]["values"]) == TURNED[kind]
    assert error(logits(original.module, x), logits(done.module, x)) < 1e-5
    changed = [
        not torch.equal(a, b) for a, b in zip(original.module.parameters(), done.module.parameters(), strict=True)
    ]
    assert any(changed)
    again = model(kind)
    QuaRot().restore_(again, record)
    again.module.load_state_dict(done.module.state_dict())
    assert torch.equal(logits(again.module, x), logits(done.module, x))


def test_a_channel_that_stands_out_no_longer_does() -> None:
    original = model("class token")
    with torch.no_grad():
        original.module.get_parameter("pos_embed")[..., 5] += 30.0

    def peak(module: nn.Module) -> float:
        """Of what the first LayerNorm gives: the greatest channel against the typical one."""
        assert isinstance(module, GraphModule)
        seen: list[torch.Tensor] = []

        class Walk(torch.fx.Interpreter):
            def run_node(self, n):
                value = super().run_node(n)
                if n.target is aten.layer_norm.default:
                    seen.append(value)
                return value

        with torch.no_grad():
            Walk(module).run(images())
        greatest = seen[0].flatten(0, -2).abs().amax(0)
        return float(greatest.max() / greatest.median())

    assert peak(original.module) > 3 * peak(turned(original).module)


def test_few_bits_lose_less_after_it() -> None:
    original, x = model("class token"), images(8)
    with torch.no_grad():
        original.module.get_parameter("pos_embed")[..., 5] += 30.0
    exact, context = logits(original.module, x), Context(images=Smooth(), seed=1)
    plain = pipeline.run(original.copy(), Recipe((AdaLog(),)), context)
    after = pipeline.run(original.copy(), Recipe((QuaRot(), AdaLog())), context)
    assert error(exact, logits(after.module, x)) < error(exact, logits(plain.module, x))
