"""The view's parts, put together by hand in float64, give what the library's own block gives."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin
from torchvision.models.swin_transformer import SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from martlet.core.errors import SourceError
from martlet.vit import AttentionView, BlockView, LinearView, MlpView, Part, TokenLayout, VitView, view

Factory = Callable[[], nn.Module]


def timm_vit(**kwargs: object) -> nn.Module:
    defaults = {"img_size": (24, 16), "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**(defaults | kwargs))


def hf(name: str, **kwargs: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 20}
    config = getattr(transformers, f"{name}Config")(
        **({"image_size": 24, "patch_size": 8, "num_labels": 5} | (sizes if name != "Swin" else {}) | kwargs)
    )
    return getattr(transformers, f"{name}ForImageClassification")(config)


MODELS: dict[str, Factory] = {
    "timm_one_head": lambda: timm_vit(num_heads=1),
    "timm_no_class_token": lambda: timm_vit(class_token=False, global_pool="avg", qkv_bias=False),
    "timm_registers": lambda: timm_vit(reg_tokens=4, qk_norm=True, init_values=0.1, mlp_layer=SwiGLUPacked),
    "timm_scale_norms": lambda: timm_vit(scale_attn_norm=True, scale_mlp_norm=True, mlp_layer=SwiGLU),
    "timm_gate_last": lambda: timm_vit(mlp_layer=GluMlp, drop_path_rate=0.1),
    "timm_post_norm": lambda: timm_vit(block_fn=ResPostBlock, init_values=0.1),
    "timm_distilled": lambda: VisionTransformerDistilled(
        img_size=16, patch_size=8, embed_dim=12, depth=3, num_heads=3, num_classes=5
    ),
    "timm_swin": lambda: SwinTransformer(
        img_size=(32, 16), patch_size=4, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4, num_classes=5
    ),
    "hf_vit": lambda: hf("ViT", num_attention_heads=1, qkv_bias=False),
    "hf_deit": lambda: hf("DeiT"),
    "hf_dinov2": lambda: hf("Dinov2", mlp_ratio=2, drop_path_rate=0.1),
    "hf_dinov2_registers": lambda: hf("Dinov2WithRegisters", num_register_tokens=4, use_swiglu_ffn=True),
    "hf_swin": lambda: hf(
        "Swin", image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4
    ),
    "torchvision_vit": lambda: TorchvisionViT(
        image_size=24, patch_size=8, num_layers=3, num_heads=3, hidden_dim=12, mlp_dim=20, num_classes=5
    ),
    "torchvision_swin": lambda: TorchvisionSwin(
        patch_size=[4, 4], embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=[4, 4], num_classes=5
    ),
}
SIZES = {"timm_distilled": (16, 16), "timm_swin": (32, 16), "hf_swin": (32, 32), "torchvision_swin": (32, 32)}


def build(name: str) -> nn.Module:
    """In float64, with parameters of which none is 0 or 1, so that leaving one out shows."""
    torch.manual_seed(0)
    module = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)
    return module


def image_size(name: str) -> tuple[int, int]:
    return SIZES.get(name, (24, 16) if name.startswith("timm") else (24, 24))


def blocks_in_and_out(name: str, module: nn.Module, blocks: tuple[BlockView, ...]) -> list[tuple[Tensor, Tensor]]:
    """What each block got and gave on two random images; in Swin as (B, H, W, C)."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(block: nn.Module, args: tuple[object, ...], output: object) -> None:
        x, y = args[0], output[0] if isinstance(output, tuple) else output
        assert isinstance(x, Tensor)
        assert isinstance(y, Tensor)
        if name == "hf_swin":
            (h, w), c = args[1], x.shape[-1]  # type: ignore[misc]
            x, y = x.reshape(-1, h, w, c), y.reshape(-1, h, w, c)
        seen.append((x.clone(), y.clone()))

    handles = [block.module.register_forward_hook(hook) for block in blocks]
    with torch.no_grad():
        module(torch.randn(2, 3, *image_size(name), dtype=torch.float64))
    for handle in handles:
        handle.remove()
    return seen


def attend(attention: AttentionView, x: Tensor, added: Tensor | None = None) -> Tensor:
    """Attention among tokens x (N, C), one score at a time; added (H, N, N) to the scores."""
    d, n = attention.head_dim, len(x)
    q, k, v = (apply(map_, x) for map_ in (attention.query, attention.key, attention.value))  # (N, H D)
    heads = []
    for h in range(attention.num_heads):
        columns = slice(h * d, (h + 1) * d)
        rows = []
        for i in range(n):
            query, scores = through(attention.query_norm, q[i, columns]), []
            for j in range(n):
                key = through(attention.key_norm, k[j, columns])
                score = float(attention.scale * sum(query * key))
                scores.append(score if added is None else score + float(added[h, i, j]))
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            rows.append(sum(w * v[j, columns] for j, w in enumerate(weights)) / sum(weights))
        heads.append(torch.stack(rows))  # (N, D)
    return apply(attention.proj, through(attention.norm, torch.cat(heads, 1)))  # (N, C)


def attend_in_windows(attention: AttentionView, x: Tensor) -> Tensor:
    """The same, among the tokens of each window of x (H, W, C), those that a shift brought together kept apart."""
    assert attention.window is not None
    grid, (h, w) = x.shape[:2], attention.window.size
    dy, dx = (s if size < side else 0 for s, size, side in zip(attention.window.shift, (h, w), grid, strict=True))
    bias, out = attention.window.position_bias(), torch.empty_like(x)

    def region(at: int, side: int, size: int, shift: int) -> int:
        return (at >= side - size) + (at >= side - shift) if shift else 0

    for top in range(0, grid[0], h):
        for left in range(0, grid[1], w):
            places = [(top + i, left + j) for i in range(h) for j in range(w)]
            regions = [(region(i, grid[0], h, dy), region(j, grid[1], w, dx)) for i, j in places]
            apart = torch.tensor([[-100.0 * (a != b) for b in regions] for a in regions], dtype=x.dtype)
            ys, xs = zip(*(((i + dy) % grid[0], (j + dx) % grid[1]) for i, j in places), strict=True)
            out[ys, xs] = attend(attention, x[ys, xs], bias + apart)
    return out


def apply(map_: LinearView, x: Tensor) -> Tensor:
    y = x @ map_.weight.T
    return y if map_.bias is None else y + map_.bias


def through(part: Part | None, x: Tensor) -> Tensor:
    return x if part is None else part.module(x)


def mlp_oracle(mlp: MlpView, x: Tensor) -> Tensor:
    hidden = apply(mlp.fc1, x)
    hidden = mlp.act(hidden) if mlp.gate is None else mlp.act(apply(mlp.gate, x)) * hidden
    return apply(mlp.fc2, through(mlp.norm, hidden))


def block_oracle(block: BlockView, x: Tensor) -> Tensor:
    """x (B, N, C) or (B, H, W, C)."""
    one = attend if block.attention.window is None else attend_in_windows

    def attention(y: Tensor) -> Tensor:
        return torch.stack([one(block.attention, image) for image in y])

    branches = (
        (attention, block.norm1, block.layer_scale1),
        (lambda y: mlp_oracle(block.mlp, y), block.norm2, block.layer_scale2),
    )
    for branch, norm, scale in branches:
        update = norm.module(branch(x)) if block.post_norm else branch(norm.module(x))
        x = x + through(scale, update)
    return x


def parts(item: object) -> Iterator[Part]:
    if isinstance(item, tuple):
        for each in item:
            yield from parts(each)
    elif dataclasses.is_dataclass(item):
        if isinstance(item, Part):
            yield item
        for field in dataclasses.fields(item):
            yield from parts(getattr(item, field.name))


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_compute_what_the_block_does(name: str) -> None:
    module = build(name)
    found = view(module)
    seen = blocks_in_and_out(name, module, found.blocks)
    assert len(seen) == len(found.blocks) == (4 if "swin" in name and name != "timm_swin" else 3)
    with torch.no_grad():
        for block, (x, y) in zip(found.blocks, seen, strict=True):
            torch.testing.assert_close(block_oracle(block, x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_this_can_fail(name: str) -> None:
    """Parts exchanged, or windows not shifted, are another function."""
    module = build(name)
    found = view(module)
    block, (x, y) = found.blocks[1], blocks_in_and_out(name, module, found.blocks)[1]
    attention, mlp = block.attention, block.mlp
    wrong_attention = [dataclasses.replace(attention, key=attention.value, value=attention.key)]
    if attention.window is not None:
        wrong_attention.append(
            dataclasses.replace(attention, window=dataclasses.replace(attention.window, shift=(0, 0)))
        )
    wrong = [dataclasses.replace(block, attention=each) for each in wrong_attention]
    wrong.append(dataclasses.replace(block, norm1=block.norm2, norm2=block.norm1))
    if mlp.is_gated:
        wrong.append(dataclasses.replace(block, mlp=dataclasses.replace(mlp, fc1=mlp.gate, gate=mlp.fc1)))
    with torch.no_grad():
        for each in wrong:
            assert not torch.allclose(block_oracle(each, x), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_names_lead_to_the_models_own_modules(name: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(name)

    wrapper = Wrapper()
    before = {key: value.clone() for key, value in wrapper.state_dict().items()}
    modules = dict(wrapper.named_modules())
    found = view(wrapper)
    assert found.root.name == "inner"
    for part in parts(found):
        assert wrapper.get_submodule(part.name) is part.module
    for map_ in (p for p in parts(found) if isinstance(p, LinearView)):
        whole = getattr(map_.module, map_.weight_name)
        assert map_.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert dict(wrapper.named_modules()) == modules
    assert all(torch.equal(before[key], value) for key, value in wrapper.state_dict().items())


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("timm_one_head", TokenLayout(grid=(3, 2), class_token=True)),
        ("timm_no_class_token", TokenLayout(grid=(3, 2))),
        ("timm_registers", TokenLayout(grid=(3, 2), class_token=True, num_registers=4)),
        ("timm_distilled", TokenLayout(grid=(2, 2), class_token=True, distillation_token=True)),
        ("timm_swin", TokenLayout(grid=(8, 4))),
        ("hf_vit", TokenLayout(grid=(3, 3), class_token=True)),
        ("hf_deit", TokenLayout(grid=(3, 3), class_token=True, distillation_token=True)),
        ("hf_dinov2_registers", TokenLayout(grid=(3, 3), class_token=True, num_registers=4)),
        ("hf_swin", TokenLayout(grid=(8, 8))),
        ("torchvision_vit", TokenLayout(grid=(3, 3), class_token=True)),
        ("torchvision_swin", TokenLayout(grid=None)),
    ],
)
def test_token_layout(name: str, tokens: TokenLayout) -> None:
    module = build(name)
    found = view(module)
    assert found.tokens == tokens
    x = blocks_in_and_out(name, module, found.blocks)[0][0]
    assert x.shape[-1] == found.embed_dim
    if tokens.num_tokens is not None:
        assert x[0, ..., 0].numel() == tokens.num_tokens


def test_windows_are_clipped_to_the_grid() -> None:
    windows = [(w.size, w.shift) for block in view(build("timm_swin")).blocks if (w := block.attention.window)]
    assert windows == [((4, 4), (0, 0)), ((4, 4), (2, 0)), ((4, 2), (0, 0))]
    windows = [(w.size, w.shift) for block in view(build("hf_swin")).blocks if (w := block.attention.window)]
    assert windows == [((4, 4), (0, 0)), ((4, 4), (2, 2)), ((4, 4), (0, 0)), ((4, 4), (0, 0))]
    assert [block.stage for block in view(build("torchvision_swin")).blocks] == [0, 0, 1, 1]


def summary(found: VitView) -> tuple[object, ...]:
    return found.library, found.family, [head.name for head in found.heads], found.blocks[0].attention.is_fused


def test_what_is_there_is_named() -> None:
    assert summary(view(build("timm_post_norm"))) == ("timm", "vit", ["head"], True)
    assert summary(view(build("timm_distilled")))[2] == ["head", "head_dist"]
    assert summary(view(build("timm_swin"))) == ("timm", "swin", ["head.fc"], True)
    assert summary(view(build("hf_dinov2"))) == ("hf", "vit", ["classifier"], False)
    assert summary(view(build("torchvision_vit"))) == ("torchvision", "vit", ["heads.head"], True)
    gated = view(build("timm_gate_last")).blocks
    assert gated[0].drop_path1 is None  # its rate is 0
    assert gated[2].drop_path1 is not None
    assert gated[0].layer_scale1 is None
    assert view(build("timm_registers")).blocks[0].layer_scale2 is not None
    assert view(build("timm_no_class_token")).norm.name == "fc_norm"  # type: ignore[union-attr]
    assert view(timm_vit(num_classes=0)).heads == ()


def test_what_is_written_to_the_view_is_in_the_model() -> None:
    module = build("torchvision_vit")
    value = view(module).blocks[1].attention.value
    with torch.no_grad():
        value.weight.zero_()
    weight = module.get_parameter("encoder.layers.encoder_layer_1.self_attention.in_proj_weight")
    assert weight[24:].abs().sum() == 0
    assert weight[:24].abs().min() > 0


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (resnet18, r"torchvision\.models\.resnet\.ResNet is no vision transformer .* timm VisionTransformer"),
        (lambda: timm_vit(block_fn=ParallelScalingBlock), r"ParallelScalingBlock at blocks\.0"),
        (lambda: timm_vit(block_fn=ParallelThingsBlock), r"ParallelThingsBlock at blocks\.0"),
        (lambda: timm_vit(block_fn=DiffParallelScalingBlock, num_heads=2, embed_dim=16), "DiffParallelScalingBlock"),
        (lambda: timm_vit(attn_layer="diff", num_heads=2, embed_dim=16), r"DiffAttention at blocks\.0\.attn"),
        (lambda: nn.ModuleList([timm_vit(), timm_vit()]), r"2 vision transformers \(0, 1\)"),
        (lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), "already a traced graph"),
        (
            lambda: TorchvisionSwin([4, 4], 8, [1, 1], [1, 2], [4, 4], block=SwinTransformerBlockV2),
            r"SwinTransformerBlockV2 at features\.1\.0",
        ),
    ],
)
def test_refusals_name_the_class(factory: Factory, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        view(factory())


def test_asking_imports_no_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from torch import nn; from martlet.vit import view\n"
        "try: view(nn.Linear(2, 2))\n"
        "except Exception as e: print(type(e).__name__)\n"
        "print(sorted({'timm', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert out[:2] == ["SourceError", "[]"]
