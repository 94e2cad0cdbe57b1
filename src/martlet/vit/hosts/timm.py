"""The view of timm's VisionTransformer (ViT, DeiT, DINOv2, SigLIP …) and SwinTransformer."""

from __future__ import annotations

from typing import cast

from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage, WindowAttention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

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
    """As timm's blocks call attention."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """mask: of windows; attn_mask, is_causal: of a plain vision transformer, where nothing sets them."""
        return self.attend(x, attn_mask if mask is None else mask)


def vit(root: Part) -> VitView:
    """ViT in timm's many variants, pre- and post-norm.

    Raises:
        SourceError: blocks with parallel branches, differential or gated attention, or another MLP.
    """
    model = cast(VisionTransformer, root.module)
    distilled = isinstance(model, VisionTransformerDistilled)
    grid = cast(tuple[int, int] | None, model.patch_embed.grid_size)
    return VitView(
        library="timm",
        family="vit",
        root=root,
        blocks=tuple(_block(need(root, f"blocks.{i}")) for i in range(len(model.blocks))),
        patch_embed=need(root, "patch_embed"),
        norm=part(root, "norm") or part(root, "fc_norm"),
        heads=_heads(root, *(("head", "head_dist") if distilled else ("head",))),
        tokens=TokenLayout(
            grid=grid and (grid[0], grid[1]),
            class_token=model.cls_token is not None,
            distillation_token=distilled,
            num_registers=model.num_reg_tokens,
        ),
        embed_dim=model.embed_dim,
    )


def swin(root: Part) -> VitView:
    """Swin, with the windows and shifts that timm clips to the grid.

    Raises:
        SourceError: blocks of another kind than timm's.
    """
    model = cast(SwinTransformer, root.module)
    grid = cast(tuple[int, int], model.patch_embed.grid_size)
    stages = [(i, cast(SwinTransformerStage, stage)) for i, stage in enumerate(model.layers.children())]
    return VitView(
        library="timm",
        family="swin",
        root=root,
        blocks=tuple(
            _swin_block(need(root, f"layers.{i}.blocks.{j}"), i)
            for i, stage in stages
            for j in range(len(stage.blocks))
        ),
        patch_embed=need(root, "patch_embed"),
        norm=part(root, "norm"),
        heads=_heads(root, "head.fc"),
        tokens=TokenLayout(grid=None if model.dynamic_img_size else grid),
        embed_dim=linear(need(root, "layers.0.blocks.0"), "attn.qkv").weight.shape[1],
    )


def _block(at: Part) -> BlockView:
    block = at.module
    if not isinstance(block, Block | ResPostBlock):
        raise refuse(at, "doesn't have one attention and one MLP, one after the other")
    attention = need(at, "attn")
    return BlockView(
        at.name,
        block,
        attention=shaped(attention) or _attention(attention),
        mlp=_mlp(need(at, "mlp")),
        norm1=need(at, "norm1"),
        norm2=need(at, "norm2"),
        layer_scale1=part(at, "ls1"),
        layer_scale2=part(at, "ls2"),
        drop_path1=part(at, "drop_path1"),
        drop_path2=part(at, "drop_path2"),
        post_norm=isinstance(block, ResPostBlock),
    )


def _attention(at: Part) -> AttentionView:
    attention = at.module
    if type(attention) is not Attention:
        raise refuse(at, "isn't plain softmax attention")
    if attention.gate is not None:
        raise refuse(at, "gates its output")
    query, key, value = thirds(at, "qkv")
    return AttentionView(
        at.name,
        attention,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=attention.scale,
        query=query,
        key=key,
        value=value,
        proj=linear(at, "proj"),
        query_norm=part(at, "q_norm"),
        key_norm=part(at, "k_norm"),
        norm=part(at, "norm"),
    )


def _swin_block(at: Part, stage: int) -> BlockView:
    block, attention = at.module, need(at, "attn")
    if not isinstance(block, SwinTransformerBlock):
        raise refuse(at, "isn't a block of the first Swin")
    shift = (block.shift_size[0], block.shift_size[1])
    return BlockView(
        at.name,
        block,
        attention=shaped(attention, shift, shifts_first=True) or _window_attention(attention, block, shift),
        mlp=_mlp(need(at, "mlp")),
        norm1=need(at, "norm1"),
        norm2=need(at, "norm2"),
        drop_path1=part(at, "drop_path1"),
        drop_path2=part(at, "drop_path2"),
        stage=stage,
    )


def _window_attention(at: Part, block: SwinTransformerBlock, shift: tuple[int, int]) -> AttentionView:
    window = at.module
    if not isinstance(window, WindowAttention):
        raise refuse(at, "isn't the attention of the first Swin")
    query, key, value = thirds(at, "qkv")
    return AttentionView(
        at.name,
        window,
        num_heads=window.num_heads,
        head_dim=query.weight.shape[0] // window.num_heads,
        scale=window.scale,
        query=query,
        key=key,
        value=value,
        proj=linear(at, "proj"),
        window=Window(
            size=(block.window_size[0], block.window_size[1]),
            shift=shift,
            position_bias=position_bias(window._get_rel_pos_bias),
            shifts_first=True,
        ),
    )


def _mlp(at: Part) -> MlpView:
    mlp, gate = at.module, None
    if type(mlp) is Mlp:
        fc1 = linear(at, "fc1")
    elif type(mlp) is SwiGLU:
        fc1, gate = linear(at, "fc1_x"), linear(at, "fc1_g")
    elif type(mlp) is GluMlp:
        width = linear(at, "fc2").weight.shape[1]
        first, second = linear(at, "fc1", slice(0, width)), linear(at, "fc1", slice(width, 2 * width))
        fc1, gate = (first, second) if mlp.gate_last else (second, first)
    else:
        raise refuse(at, "isn't an MLP of two layers, plain or gated")
    return MlpView(
        at.name, mlp, fc1=fc1, act=cast(nn.Module, mlp.act), fc2=linear(at, "fc2"), gate=gate, norm=part(at, "norm")
    )


def _heads(root: Part, *names: str) -> tuple[LinearView, ...]:
    return tuple(linear(root, name) for name in names if part(root, name))
