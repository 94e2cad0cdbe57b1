"""The view of Hugging Face image classifiers: ViT, DeiT, DINOv2 with and without registers, Swin."""

from __future__ import annotations

from typing import Any

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
    shaped,
)

HEADS = ("classifier", "cls_classifier", "distillation_classifier")


class CutAttention(ShapedAttention):
    """As Hugging Face's blocks call attention: weights are expected beside the output, and read by nobody."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **more: object) -> tuple[Tensor, None]:
        return self.attend(x, attention_mask), None


def vit(root: Part) -> VitView:
    """ViT, DeiT and DINOv2, of which the last scales its residuals."""
    base = _base(root)
    embeddings = base.module.embeddings
    layers = "layers" if hasattr(base.module, "layers") else "encoder.layer"
    blocks = tuple(_block(need(base, f"{layers}.{i}")) for i in range(len(base.module.get_submodule(layers))))
    registers = getattr(embeddings, "register_tokens", None)
    patches = embeddings.patch_embeddings
    (h, w), (ph, pw) = patches.image_size, patches.patch_size
    return VitView(
        library="hf",
        family="vit",
        root=root,
        blocks=blocks,
        patch_embed=need(base, "embeddings.patch_embeddings"),
        norm=part(base, "layernorm"),
        heads=_heads(root),
        tokens=TokenLayout(
            grid=(h // ph, w // pw),
            class_token=True,
            distillation_token=hasattr(embeddings, "distillation_token"),
            num_registers=0 if registers is None else registers.shape[1],
        ),
        embed_dim=blocks[0].attention.query.weight.shape[1],
    )


def swin(root: Part) -> VitView:
    """Swin, with the windows that it uses at the configured image size."""
    base = _base(root)
    h, w = grid = tuple(base.module.embeddings.patch_grid)
    blocks: list[BlockView] = []
    for i, stage in enumerate(base.module.encoder.layers):
        for j in range(len(stage.blocks)):
            blocks.append(_swin_block(need(base, f"encoder.layers.{i}.blocks.{j}"), i, (h, w)))
        h, w = (h + 1) // 2, (w + 1) // 2
    return VitView(
        library="hf",
        family="swin",
        root=root,
        blocks=tuple(blocks),
        patch_embed=need(base, "embeddings.patch_embeddings"),
        norm=part(base, "layernorm"),
        heads=_heads(root),
        tokens=TokenLayout(grid=grid),
        embed_dim=blocks[0].attention.query.weight.shape[1],
    )


def _base(root: Part) -> Any:
    """The encoder inside the classifier. Typed loosely: transformers' modules carry no types for their parts."""
    return need(root, root.module.base_model_prefix)  # type: ignore[arg-type]


def _block(at: Part) -> BlockView:
    dino = hasattr(at.module, "norm1")
    return BlockView(
        at.name,
        at.module,
        attention=shaped(need(at, "attention")) or _attention(need(at, "attention")),
        mlp=_mlp(need(at, "mlp")),
        norm1=need(at, "norm1" if dino else "layernorm_before"),
        norm2=need(at, "norm2" if dino else "layernorm_after"),
        layer_scale1=part(at, "layer_scale1"),
        layer_scale2=part(at, "layer_scale2"),
        drop_path1=part(at, "drop_path"),
        drop_path2=part(at, "drop_path"),
    )


def _swin_block(at: Part, stage: int, grid: tuple[int, int]) -> BlockView:
    block: Any = at.module
    attention, shift = need(at, "attention"), (block.shift_size, block.shift_size)
    if min(grid) <= block.window_size:  # then there is one window a side, and nothing to shift
        shift = (0, 0)
    return BlockView(
        at.name,
        block,
        attention=shaped(attention, shift) or _window_attention(attention, shift),
        mlp=_mlp(need(at, "mlp")),
        norm1=need(at, "layernorm_before"),
        norm2=need(at, "layernorm_after"),
        drop_path1=part(at, "drop_path"),
        stage=stage,
    )


def _window_attention(at: Part, shift: tuple[int, int]) -> AttentionView:
    bias: Any = need(at, "relative_position_bias").module
    return _attention(at, Window(tuple(bias.window_size), shift, position_bias(bias)))


def _attention(at: Part, window: Window | None = None) -> AttentionView:
    attention: Any = at.module
    return AttentionView(
        at.name,
        attention,
        num_heads=attention.num_attention_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        query=linear(at, "q_proj"),
        key=linear(at, "k_proj"),
        value=linear(at, "v_proj"),
        proj=linear(at, "o_proj"),
        window=window,
    )


def _mlp(at: Part) -> MlpView:
    mlp: Any = at.module
    if isinstance(getattr(mlp, "gate_proj", None), nn.Linear):
        fc1, gate, fc2 = (linear(at, name) for name in ("up_proj", "gate_proj", "down_proj"))
        return MlpView(at.name, mlp, fc1=fc1, act=mlp.act_fn, fc2=fc2, gate=gate)
    return MlpView(at.name, mlp, fc1=linear(at, "fc1"), act=mlp.activation_fn, fc2=linear(at, "fc2"))


def _heads(root: Part) -> tuple[LinearView, ...]:
    return tuple(linear(root, name) for name in HEADS if part(root, name))
