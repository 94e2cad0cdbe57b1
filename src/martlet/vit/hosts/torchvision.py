"""The view of torchvision's VisionTransformer and SwinTransformer."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer, SwinTransformerBlock
from torchvision.models.vision_transformer import VisionTransformer

from martlet.nn.attention import ShapedAttention
from martlet.vit.view import (
    AttentionView,
    BlockView,
    LinearView,
    MlpView,
    Part,
    TokenLayout,
    VitView,
    Window,
    linear,
    need,
    part,
    position_bias,
    refuse,
    shaped,
    thirds,
)


class CutAttention(ShapedAttention):
    """As torchvision's blocks call attention: q, k and v of the same tokens, and weights beside the output."""

    def forward(self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        return self.attend(x), None


def vit(root: Part) -> VitView:
    """ViT, whose attention is an `nn.MultiheadAttention` with q, k and v in one parameter."""
    model = cast(VisionTransformer, root.module)
    names = [name for name, _ in model.encoder.layers.named_children()]
    side = model.image_size // model.patch_size
    return VitView(
        library="torchvision",
        family="vit",
        root=root,
        blocks=tuple(_block(need(root, f"encoder.layers.{name}")) for name in names),
        patch_embed=need(root, "conv_proj"),
        norm=part(root, "encoder.ln"),
        heads=(linear(root, "heads.head"),) if part(root, "heads.head") else (),
        tokens=TokenLayout(grid=(side, side), class_token=True),
        embed_dim=model.hidden_dim,
    )


def swin(root: Part) -> VitView:
    """It takes images of any size, so `grid` is None, and a shift holds only where the window doesn't cover the image.

    Raises:
        SourceError: the second Swin, whose norms and scores differ.
    """
    model = cast(SwinTransformer, root.module)
    blocks: list[BlockView] = []
    for i, stage in enumerate(list(model.features)[1::2]):  # patch embedding, stage, merging, stage, …
        names = [f"features.{2 * i + 1}.{name}" for name, _ in stage.named_children()]
        blocks += [_swin_block(need(root, name), i) for name in names]
    return VitView(
        library="torchvision",
        family="swin",
        root=root,
        blocks=tuple(blocks),
        patch_embed=need(root, "features.0"),
        norm=part(root, "norm"),
        heads=(linear(root, "head"),) if part(root, "head") else (),
        tokens=TokenLayout(grid=None),
        embed_dim=blocks[0].attention.query.weight.shape[1],
    )


def _block(at: Part) -> BlockView:
    attention = need(at, "self_attention")
    return BlockView(
        at.name,
        at.module,
        attention=shaped(attention) or _attention(attention),
        mlp=_mlp(need(at, "mlp")),
        norm1=need(at, "ln_1"),
        norm2=need(at, "ln_2"),
    )


def _attention(found: Part) -> AttentionView:
    attention = cast(nn.MultiheadAttention, found.module)
    query, key, value = (
        LinearView(
            found.name,
            attention,
            rows=slice(i * attention.embed_dim, (i + 1) * attention.embed_dim),
            weight_name="in_proj_weight",
            bias_name="in_proj_bias",
        )
        for i in range(3)
    )
    return AttentionView(
        found.name,
        attention,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=attention.head_dim**-0.5,
        query=query,
        key=key,
        value=value,
        proj=linear(found, "out_proj"),
    )


def _swin_block(at: Part, stage: int) -> BlockView:
    found = need(at, "attn")
    attention = found.module
    if type(at.module) is not SwinTransformerBlock or type(attention) is not ShiftedWindowAttention:
        raise refuse(at, "isn't a block of the first Swin")
    query, key, value = thirds(found, "qkv")
    head_dim = query.weight.shape[0] // attention.num_heads
    return BlockView(
        at.name,
        at.module,
        attention=AttentionView(
            found.name,
            attention,
            num_heads=attention.num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            query=query,
            key=key,
            value=value,
            proj=linear(found, "proj"),
            window=Window(
                size=(attention.window_size[0], attention.window_size[1]),
                shift=(attention.shift_size[0], attention.shift_size[1]),
                position_bias=position_bias(attention.get_relative_position_bias),
            ),
        ),
        mlp=_mlp(need(at, "mlp")),
        norm1=need(at, "norm1"),
        norm2=need(at, "norm2"),
        drop_path1=part(at, "stochastic_depth"),
        drop_path2=part(at, "stochastic_depth"),
        stage=stage,
    )


def _mlp(at: Part) -> MlpView:
    """torchvision's MLP is a sequence: Linear, activation, dropout, Linear, dropout."""
    mlp = cast(nn.Sequential, at.module)
    return MlpView(at.name, mlp, fc1=linear(at, "0"), act=mlp[1], fc2=linear(at, "3"))
