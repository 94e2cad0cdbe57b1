"""A vision transformer with fewer tokens, one image and one token at a time, in float64, from the papers' words."""

import math
from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Technique
from martlet.data.preprocess import Preprocess

Token = tuple[float, Tensor]
"""Size and value (C,)."""
Choose = Callable[[list[Token], list[Tensor], list[list[float]], list[Tensor]], list[Token]]
"""From tokens, their keys (H, D), the class token's attention to each in each head, and its value (C,)
before the attention, to fewer tokens."""


def vit(**kwargs: object) -> VisionTransformer:
    """Blocks of odd number, patches 5 x 3, and parameters of which none is 0 or 1."""
    sizes = {"img_size": (40, 24), "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 3, "num_classes": 7}
    torch.manual_seed(2)
    module = VisionTransformer(**(sizes | kwargs)).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def images() -> Tensor:
    return torch.randn(2, 3, 40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def logits_with(module: VisionTransformer, technique: Technique) -> Tensor:
    """Martlet's. Float64 makes it differ from the oracle by rounding alone."""
    model = Model(name="vit", module=module, preprocess=Preprocess(size=(40, 24)), num_classes=7, origin={})
    float32 = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of the noise that the model is checked with
    try:
        done = pipeline.run(model, Recipe((technique,)), Context())
    finally:
        torch.set_default_dtype(float32)
    with torch.no_grad():
        return done.module(images())


def logits_by_hand(module: VisionTransformer, schedule: dict[int, Choose], proportional: bool) -> Tensor:
    """The oracle's: a class token's head, or the mean of patches in which each counts as its size."""
    out = []
    with torch.no_grad():
        embedded = module.norm_pre(module._pos_embed(module.patch_embed(images())))
        for image in embedded:
            tokens: list[Token] = [(1.0, x) for x in image]
            for i, block in enumerate(module.blocks):
                tokens = through(block, tokens, schedule.get(i), proportional)
            if module.global_pool == "token":
                pooled = module.norm(tokens[0][1])
            else:
                prefix = module.num_prefix_tokens
                total = sum(size for size, _ in tokens[prefix:])
                pooled = sum(size * x for size, x in tokens[prefix:]) / total  # type: ignore[assignment]
                pooled = module.fc_norm(pooled)
            out.append(module.head(pooled))
    return torch.stack(out)


def through(block: torch.nn.Module, tokens: list[Token], choose: Choose | None, proportional: bool) -> list[Token]:
    attention = block.attn
    heads, width = attention.num_heads, attention.head_dim
    q, k, v = [], [], []
    for _, x in tokens:
        query, key, value = attention.qkv(block.norm1(x)).reshape(3, heads, width)
        q.append(attention.q_norm(query))
        k.append(key)
        v.append(value)
    attended, seen = [], [list[float]() for _ in tokens]
    for i, (size, x) in enumerate(tokens):
        parts = []
        for h in range(heads):
            scores = [float(q[i][h] @ attention.k_norm(k[j][h])) / math.sqrt(width) for j in range(len(tokens))]
            if proportional:
                scores = [score + math.log(s) for score, (s, _) in zip(scores, tokens, strict=True)]
            weights = [math.exp(score - max(scores)) for score in scores]
            total = sum(weights)
            if i == 0:
                for weight, by_head in zip(weights, seen, strict=True):
                    by_head.append(weight / total)
            parts.append(sum(w / total * v[j][h] for j, w in enumerate(weights)))
        attended.append((size, x + attention.proj(torch.cat(parts))))  # type: ignore[arg-type]
    if choose is not None:
        attended = choose(attended, k, seen, [x for _, x in tokens])
    return [(size, x + block.mlp(block.norm2(x))) for size, x in attended]


def mean(group: list[Token]) -> Token:
    """A token as large as all, their mean weighted by size."""
    total = sum(size for size, _ in group)
    return total, sum(size * x for size, x in group) / total  # type: ignore[return-value]
