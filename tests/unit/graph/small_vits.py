"""Tiny models with odd features, traced once, and their twins with every parameter drawn anew."""

import copy
import functools

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from martlet.graph.trace import trace

SIZE = (16, 16)


def vit(**settings: object) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**(sizes | settings))  # type: ignore[arg-type]


MODELS = {
    "class token": vit,
    "no class token": lambda: vit(class_token=False, global_pool="avg", depth=3),
    "registers and qk-norm": lambda: vit(reg_tokens=2, qk_norm=True),
    "convolutions": lambda: ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 4, 8, 8), num_classes=5),  # type: ignore[arg-type]
}
VITS = [name for name in MODELS if name != "convolutions"]


class Noise:
    """Calibration images: the same noise whenever they are asked for."""

    num_images = 8

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(4, 3, *SIZE, generator=generator)


@functools.cache
def _trace(name: str) -> GraphModule:
    return trace(MODELS[name]().eval(), SIZE)


def traced(name: str, seed: int = 0) -> GraphModule:
    """A trace with every parameter random, so that no bias is 0 and no scale 1."""
    graph_module = copy.deepcopy(_trace(name))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graph_module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return graph_module.requires_grad_(False)


def logits(graph_module: GraphModule) -> Tensor:
    images = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return graph_module(images.to(next(graph_module.parameters()).dtype))[0]


def error(first: Tensor, second: Tensor) -> float:
    return ((first - second).norm() / first.norm()).item()


def node_of(graph_module: GraphModule, parameter: str) -> Node:
    """The Linear or convolution that reads a parameter."""
    [getter] = [node for node in graph_module.graph.nodes if node.op == "get_attr" and node.target == parameter]
    [reader] = getter.users
    return reader
