"""RepQuant (arXiv 2402.05628) on tiny models: LayerNorms have the grid they were changed to, and logits stay."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import Smooth, compress, error, images, logits, model
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from martlet.core.model import Model
from martlet.core.technique import Context, Stage, silent
from martlet.data.preprocess import Preprocess
from martlet.functional.quantize.percentile import percentile_scales
from martlet.graph.rewrite.reparameterize import common_grid
from martlet.graph.rewrite.shifting import norms_before_linears
from martlet.graph.sites import sites
from martlet.graph.trace import capture
from martlet.nn.quantizers import TableQuantizer
from martlet.techniques.quantize.repq_vit import RepQViT
from martlet.techniques.quantize.repquant import RepQuant

KIND = "no class token, odd depth"
BITS = 3


@pytest.fixture(scope="module")
def prepared() -> GraphModule:
    graph_module = model(KIND).module
    assert isinstance(graph_module, GraphModule)
    graph_module.requires_grad_(False)
    RepQuant(activation_bits=BITS).prepare_(graph_module, torch.cat(list(Smooth())), Context(progress=silent))
    return graph_module


def test_the_float_model_stays_the_same(prepared) -> None:
    exact = logits(model(KIND).module, images())
    assert error(exact, logits(prepared, images())) < 1e-4


def test_a_changed_layer_norm_has_the_grid_of_its_channels(prepared) -> None:
    done = compress(model(KIND), "repquant", activation_bits=BITS).module
    assert isinstance(done, GraphModule)
    quantizers = {
        site.name: done.get_submodule(str(site.node.args[0].target))  # type: ignore[union-attr]
        for site in sites(done)
        if site.kind == "linear"
    }
    changed = [n for n in norms_before_linears(prepared) if common_grid(n) is not None]
    assert len(changed) == 7
    found = []
    for norm in changed:
        change = common_grid(norm)
        assert change is not None
        for quantizer in quantizers.values():
            if isinstance(quantizer, TableQuantizer) and torch.isclose(quantizer.scale, change.scale, rtol=1e-5):
                assert float(quantizer.offset) == float(change.zero_point)
                found.append(norm)
    assert found == changed
    plain = compress(model(KIND), "repq_vit", activation_bits=BITS).module
    assert not torch.allclose(logits(done, images()), logits(plain, images()), atol=1e-3)


def channels() -> tuple[Tensor, Tensor]:
    """A LayerNorm's output, of which one token stretches some channels, and the weight that reads it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 8, generator=generator)
    x[0, :4] += 7.0
    return x, torch.randn(12, 8, generator=generator)


def rounded_output_error(technique: RepQuant | RepQViT) -> float:
    """After the change, every channel rounded to the one grid, in float64."""
    x, weight = (t.double() for t in channels())
    change = technique.change(channels()[0], [channels()[1]])
    moved, wider = (x + change.offset) / change.ratio, weight * change.ratio
    scale, zero = float(change.scale), float(change.zero_point)  # type: ignore[attr-defined]
    codes = (torch.round(moved / scale) + zero).clamp(0, 2**technique.activation_bits - 1)
    return float((((codes - zero) * scale - moved) @ wider.T).square().mean())


def test_learned_ends_lower_the_output_error() -> None:
    ours, percentiles = (rounded_output_error(cls(activation_bits=4)) for cls in (RepQuant, RepQViT))
    assert ours < 0.95 * percentiles


def test_the_change_has_a_code_for_zero_whatever_the_channels() -> None:
    """Channels far above zero have zero points below all codes; their common one is a code."""
    x, weight = channels()
    assert float(percentile_scales((x + 40).T, 4)[1].mean()) < 0
    change = RepQuant(activation_bits=4).change(x + 40, [weight])
    assert 0 <= float(change.zero_point) <= 15  # type: ignore[attr-defined]


class Text(nn.Module):
    """CLIP's encoder of a text's tokens (B, L), in small: causal, the embedding of the last token."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 48,
        }
        tokens: dict[str, Any] = {
            "vocab_size": 64,
            "bos_token_id": 62,
            "eos_token_id": 63,
            "max_position_embeddings": 16,
        }
        self.encoder = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **tokens, projection_dim=5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens).text_embeds


class Texts:
    num_images = 16

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            yield torch.randint(0, 62, (8, 12), generator=generator)


def test_a_text_transformer_is_quantized_by_the_same_call() -> None:
    torch.manual_seed(0)
    graph_module, tokens = capture(Text().eval(), torch.zeros(2, 12, dtype=torch.long)), torch.cat(list(Texts()))
    exact = logits(graph_module, tokens)
    errors = []
    for bits in (4, 8):
        text = Model(
            name="text",
            module=graph_module,
            preprocess=Preprocess(size=(12, 12)),
            num_classes=5,
            origin={},
            stage=Stage.GRAPH,
        ).copy()
        method = RepQuant(weight_bits=bits, activation_bits=bits)
        assert isinstance(text.module, GraphModule)
        changed = copy.deepcopy(text.module)
        assert method.prepare_(changed, tokens, Context())["reparameterized"] == 6
        assert error(exact, logits(changed, tokens)) < 1e-4
        record = method.apply_(text, Context(images=Texts()))
        assert record["quantized"] == {"linear": 19, "scores": 3, "values": 3}
        errors.append(error(exact, logits(text.module, tokens)))
    assert errors[1] < errors[0] / 4 < 0.25
