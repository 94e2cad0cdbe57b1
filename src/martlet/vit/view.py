"""The view: what every vision transformer has, under one set of names, whichever library made it.

It holds references to the model's own modules and copies nothing, so whoever changes a part changes the model. It
never changes the model itself. After surgery on the structure, take a new view.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core.errors import SourceError
from martlet.nn.attention import ShapedAttention
from martlet.nn.low_rank import LowRankLinear

Family = Literal["vit", "swin"]

ADAPTERS = {
    "timm.models.vision_transformer.VisionTransformer": ("timm", "vit"),
    "timm.models.swin_transformer.SwinTransformer": ("timm", "swin"),
    "transformers.models.vit.modeling_vit.ViTForImageClassification": ("hf", "vit"),
    "transformers.models.deit.modeling_deit.DeiTForImageClassification": ("hf", "vit"),
    "transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher": ("hf", "vit"),
    "transformers.models.dinov2.modeling_dinov2.Dinov2ForImageClassification": ("hf", "vit"),
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers."
    "Dinov2WithRegistersForImageClassification": ("hf", "vit"),
    "transformers.models.swin.modeling_swin.SwinForImageClassification": ("hf", "swin"),
    "torchvision.models.vision_transformer.VisionTransformer": ("torchvision", "vit"),
    "torchvision.models.swin_transformer.SwinTransformer": ("torchvision", "swin"),
}
"""Adapter file and family by the full name of a class; so that telling a class apart imports no library."""


@dataclass(frozen=True, eq=False)
class Part:
    """A module and its qualified name in the model that was given to `view`."""

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class LinearView(Part):
    """A linear map x (…, I) -> x Wᵀ + b (…, O), which may be some rows of a larger one.

    name, module: what owns the parameters; weight_name, bias_name: what they are called there.
    rows: which of the owner's output features; of three projections in one, each has its own.
    """

    rows: slice
    weight_name: str = "weight"
    bias_name: str = "bias"

    @property
    def weight(self) -> Tensor:
        """W (O, I), in the memory of the model."""
        return getattr(self.module, self.weight_name)[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """b (O,), in the memory of the model; None if there is none."""
        bias = getattr(self.module, self.bias_name)
        return None if bias is None else bias[self.rows]


@dataclass(frozen=True, eq=False)
class Window:
    """Attention inside windows (h, w), cyclically shifted by (dy, dx) tokens towards the origin; (0, 0) is unshifted.

    position_bias: computes what is added to the scores, (H, N, N) for the N = h w tokens of a window in row order.
    shifts_first: a grid that windows don't fill is shifted before it is padded, and not after.
    """

    size: tuple[int, int]
    shift: tuple[int, int]
    position_bias: Callable[[], Tensor]
    shifts_first: bool = False


@dataclass(frozen=True, eq=False)
class AttentionView(Part):
    """Multi-head attention: proj(norm(softmax(scale q kᵀ + position bias) v)).

    Head i of q and k is features i D to (i + 1) D of its projection, D being `head_dim`; of v, with `value_dim`.
    query_norm, key_norm: over the D features of each head. norm: over all H D features, before proj.
    """

    num_heads: int
    head_dim: int
    scale: float
    query: LinearView
    key: LinearView
    value: LinearView
    proj: LinearView
    query_norm: Part | None = None
    key_norm: Part | None = None
    norm: Part | None = None
    window: Window | None = None

    @property
    def value_dim(self) -> int:
        """Features of each head of v: D, unless a cut has left another number."""
        return (self.value.rows.stop - self.value.rows.start) // self.num_heads

    @property
    def is_fused(self) -> bool:
        """True if one module computes q, k and v."""
        return self.query.module is self.key.module is self.value.module


@dataclass(frozen=True, eq=False)
class MlpView(Part):
    """fc2(norm(act(fc1(x)))); with a gate, fc2(norm(act(gate(x)) fc1(x))), as in SwiGLU."""

    fc1: LinearView
    act: nn.Module
    fc2: LinearView
    gate: LinearView | None = None
    norm: Part | None = None

    @property
    def is_gated(self) -> bool:
        return self.gate is not None


@dataclass(frozen=True, eq=False)
class BlockView(Part):
    """x + s1 attention(norm1(x)), then x + s2 mlp(norm2(x)); if `post_norm`, x + norm1(attention(x)) and so on.

    layer_scale1, layer_scale2: modules that multiply each channel by s; drop_path1, drop_path2: stochastic depth, which
    does nothing in inference. stage: counted from 0; always 0 in a plain vision transformer.
    """

    attention: AttentionView
    mlp: MlpView
    norm1: Part
    norm2: Part
    layer_scale1: Part | None = None
    layer_scale2: Part | None = None
    drop_path1: Part | None = None
    drop_path2: Part | None = None
    post_norm: bool = False
    stage: int = 0


@dataclass(frozen=True)
class TokenLayout:
    """What stands where in x (B, N, C): class token, distillation token, registers, then patches in row order.

    grid: patches (down, across); None if the model takes any image size. In Swin, those of the first stage.
    """

    grid: tuple[int, int] | None
    class_token: bool = False
    distillation_token: bool = False
    num_registers: int = 0

    @property
    def num_prefix(self) -> int:
        """Tokens before the first patch."""
        return self.class_token + self.distillation_token + self.num_registers

    @property
    def num_tokens(self) -> int | None:
        """N; None if the model takes any image size."""
        return None if self.grid is None else self.num_prefix + self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class VitView:
    """A vision transformer, taken apart.

    library: the adapter, `timm`, `hf` or `torchvision`. root: the library's own model.
    patch_embed: images to patches. norm: between the last block and the head. heads: the classifiers, of which a
    distilled model has two, whose logits are averaged; empty if there is none. embed_dim: C, in Swin that of the first
    stage.
    """

    library: str
    family: Family
    root: Part
    blocks: tuple[BlockView, ...]
    patch_embed: Part
    norm: Part | None
    heads: tuple[LinearView, ...]
    tokens: TokenLayout
    embed_dim: int


def view(module: nn.Module) -> VitView:
    """Takes apart a vision transformer, or the only one inside a wrapper. Names are relative to `module`.

    Raises:
        SourceError: no vision transformer of a class that Martlet knows, more than one, or a variant of it that doesn't
            fit the view, such as attention parallel to the MLP.
    """
    if isinstance(module, GraphModule):
        raise SourceError("the model is already a traced graph; put what edits modules before what works on the graph")
    found = _outermost(module)
    if len(found) == 1:
        root, (library, family) = found[0]
        adapter = importlib.import_module(f"martlet.vit.hosts.{library}")
        return getattr(adapter, family)(root)
    what = f"{type(module).__module__}.{type(module).__qualname__}"
    if found:
        names = ", ".join(root.name for root, _ in found)
        raise SourceError(f"{what} holds {len(found)} vision transformers ({names}); give one of them")
    known = ", ".join(f"{name.split('.')[0]} {name.split('.')[-1]}" for name in ADAPTERS)
    raise SourceError(
        f"{what} is no vision transformer that can be taken apart (known: {known}); "
        "techniques that work on the graph, such as int8, take any model"
    )


def _outermost(module: nn.Module, name: str = "") -> list[tuple[Part, tuple[str, Family]]]:
    """Every module of a known class, or of one derived from it, that is in no other."""
    for base in type(module).__mro__:
        adapter = ADAPTERS.get(f"{base.__module__}.{base.__qualname__}")
        if adapter:
            return [(Part(name, module), adapter)]  # type: ignore[list-item]
    return [
        found for child_name, child in module.named_children() for found in _outermost(child, join(name, child_name))
    ]


def position_bias(give: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """(H, N, N) of what gives (1, H, N, N). A copy of it is the copied model's own, as a closure's wouldn't be."""
    return partial(_only, give)


def _only(give: Callable[[], Tensor]) -> Tensor:
    return give().squeeze(0)


def shaped(at: Part, shift: tuple[int, int] = (0, 0), shifts_first: bool = False) -> AttentionView | None:
    """The view of a `ShapedAttention` that a cut has put in the place of a library's own; None if it is another.

    shift, shifts_first: as in `Window`, if there is one.
    """
    layer = at.module
    if not isinstance(layer, ShapedAttention):
        return None
    name = join(at.name, "qkv")
    query, key, value = (LinearView(name, layer.qkv, rows) for rows in layer.rows)
    window = layer.position and Window(layer.position.window, shift, position_bias(layer.position), shifts_first)
    return AttentionView(
        at.name,
        layer,
        num_heads=layer.num_heads,
        head_dim=layer.qk_dim,
        scale=layer.scale,
        query=query,
        key=key,
        value=value,
        proj=linear(at, "proj"),
        query_norm=part(at, "q_norm"),
        key_norm=part(at, "k_norm"),
        norm=part(at, "norm"),
        window=window,
    )


def join(*names: str) -> str:
    """A qualified name from its parts, of which any may be empty."""
    return ".".join(name for name in names if name)


def part(owner: Part, name: str) -> Part | None:
    """A submodule of `owner`; None if it is missing or does nothing."""
    module = owner.module
    for leaf in name.split("."):
        module = getattr(module, leaf, None)
    return None if module is None or isinstance(module, nn.Identity) else Part(join(owner.name, name), module)


def need(owner: Part, name: str) -> Part:
    """A submodule of `owner` that must be there, be it an identity."""
    return Part(join(owner.name, name), owner.module.get_submodule(name))


def linear(owner: Part, name: str, rows: slice | None = None) -> LinearView:
    """A Linear of `owner`, or the two thin ones in its place, all of it or some of its rows.

    Raises:
        SourceError: it isn't an `nn.Linear`.
    """
    found = need(owner, name)
    if not isinstance(found.module, nn.Linear | LowRankLinear):
        raise refuse(found, f"isn't a Linear but {type(found.module).__name__}")
    return LinearView(found.name, found.module, rows or slice(0, found.module.out_features))


def thirds(owner: Part, name: str) -> Sequence[LinearView]:
    """Query, key and value of a Linear that computes all three, one after the other."""
    features = linear(owner, name).weight.shape[0] // 3
    return [linear(owner, name, slice(i * features, (i + 1) * features)) for i in range(3)]


def refuse(at: Part, why: str) -> SourceError:
    """The error for a variant that the view has no place for."""
    return SourceError(f"the view has no place for {type(at.module).__name__} at {at.name or 'the top'}: it {why}")
