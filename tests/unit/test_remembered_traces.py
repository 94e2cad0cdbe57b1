"""What is remembered of a trace is what a new trace would give, and only for the same module."""

import copy
import functools

import torch
from timm.models.vision_transformer import VisionTransformer

from martlet.graph import trace
from remembered_traces import fingerprint, remembering

X = torch.zeros(2, 3, 16, 16)


def vit(**settings) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**(sizes | settings)).eval()


def test_a_copy_is_remembered_with_parameters_of_its_own() -> None:
    asked = []

    def counted(module, example):
        asked.append(module)
        return trace.capture.__wrapped__(module, example)  # past what the tests remember

    remembered = remembering(counted)
    first, second = vit(), vit()
    remembered(first, X)
    graph_module = remembered(second, X)
    assert asked == [first]
    assert graph_module.get_parameter("blocks.0.mlp.fc1.weight") is second.blocks[0].mlp.fc1.weight
    assert graph_module.get_parameter("blocks.0.mlp.fc1.weight") is not first.blocks[0].mlp.fc1.weight
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(graph_module(x), trace.capture.__wrapped__(second, X)(x))


def test_whatever_changes_the_graph_changes_the_fingerprint() -> None:
    changed = [vit(), vit(num_heads=2), vit(norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-3)), vit()]
    changed[-1].blocks[0].mlp.fc1.weight.data[0, 0] += 1e-3
    patched = vit()
    patched.blocks[0].attn.scale = 0.7
    changed.append(patched)
    assert len({fingerprint(module, X) for module in changed}) == len(changed)
    assert fingerprint(copy.deepcopy(changed[0]), X) == fingerprint(changed[0], X)
    assert fingerprint(changed[0], X) != fingerprint(changed[0], torch.zeros(2, 3, 32, 32))
