"""What `benchmarks/prune.py` compares: Martlet's ways to make a network smaller, Torch-Pruning's, and a plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from martlet.core import pipeline, registry
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Technique
from martlet.functional.structure.blocks import block_sums
from martlet.functional.structure.low_rank import of_weight
from martlet.functional.structure.rank_allocation import breakeven
from martlet.nn.factorization import sites
from martlet.nn.low_rank import thin_linear
from martlet.techniques.prune.fusegpt import FuseGPT
from martlet.techniques.prune.lpvit import LPViT, linears
from martlet.techniques.prune.path_ensemble import PathEnsemble
from martlet.vit.paths import paths_of
from martlet.vit.structure import put_
from martlet.vit.view import view

if TYPE_CHECKING:
    from torch import Tensor

    from martlet.core.model import Model

Gradients = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Ours:
    """A technique of Martlet's, and what comes after it.

    setting: what its ratio is called. of: what that is a share of: the MACs of the `model`, those of its `linears`, or
    something else, so that it has to be searched for (`attention`). then: what follows, `int8` or `distill`.
    """

    technique: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    setting: str = "prune_ratio"
    of: str = "model"
    then: str = ""

    def at(self, ratio: float) -> Technique:
        return registry.technique(self.technique).from_settings({self.setting: ratio, **self.settings})

    def share(self, model: Model, prune_ratio: float, macs: int) -> float:
        """Its ratio where such a share of the model's MACs is to go."""
        if self.of == "model":
            return prune_ratio
        return prune_ratio * macs / sum(site.rows * site.weights for site in sites(model))


SAME = {"allocation": "same"}
OURS: dict[str, Ours] = {
    "ziplm": Ours("ziplm"),
    "taylor": Ours("taylor"),
    "magnitude": Ours("magnitude"),
    "taylor, no repair": Ours("taylor", {"repair": False}),
    "magnitude, no repair": Ours("magnitude", {"repair": False}),
    "afm": Ours("afm", setting="ratio", of="linears"),
    "svd": Ours("svd", setting="ratio", of="linears"),
    "afm, same share in each Linear": Ours("afm", SAME, "ratio", "linears"),
    "svd, same share in each Linear": Ours("svd", SAME, "ratio", "linears"),
    "comcat": Ours("comcat", setting="ratio", of="attention"),
    "ziplm, int8": Ours("ziplm", then="int8"),
    "afm, int8": Ours("afm", setting="ratio", of="linears", then="int8"),
    "comcat, int8": Ours("comcat", setting="ratio", of="attention", then="int8"),
    "ziplm, distill": Ours("ziplm", then="distill"),
}
"""The same share is the same rank in both: both cut the same Linears by it."""
THEIRS: dict[str, dict[str, Any]] = {
    f"Torch-Pruning {score}, {scope}{', bottleneck' if bottleneck else ''}": {
        "score": score,
        "global": scope != "local",
        "isomorphic": scope == "isomorphic",
        "bottleneck": bottleneck,
    }
    for score in ("magnitude", "taylor")
    for scope in ("local", "global", "isomorphic")
    for bottleneck in (True, False)
}
"""Its criteria for vision transformers: compared in a layer, in all layers, or in layers of one kind; with the width of
the residual stream left as it is (bottleneck), or cut too."""
PER_MATRIX = "svd of qkv and of proj"
ENTRIES = (*OURS, PER_MATRIX, *THEIRS)


def per_matrix(model: Model, ratio: float) -> Model:
    """Both Linears of each attention as products of the rank that removes this share of their weights."""
    done = model.copy()
    vit = view(done.module)
    for block in vit.blocks:
        for part in (block.attention.query, block.attention.proj):
            linear: Any = part.module
            rank = max(1, int((1 - ratio) * (breakeven(*linear.weight.shape) + 1)))
            put_(vit.root, part.name, thin_linear(linear, of_weight(linear.weight, linear.bias).at(rank)))
    return done


def torch_pruning(model: Model, how: Mapping[str, Any], pruning_ratio: float, gradients: Gradients) -> Any:
    """As its documentation prunes a vision transformer of timm: dimensions of heads, hidden units, and the width."""
    import torch
    import torch_pruning as tp
    from timm.layers import Attention, Mlp

    module: Any = model.copy().module.eval().requires_grad_(True)
    kept, heads = [module.head], {}
    for part in module.modules():
        if isinstance(part, Attention):
            part.fused_attn = False  # type: ignore[misc] # so that its trace sees the products
            heads[part.qkv] = part.num_heads
            kept += [part.proj] if how["bottleneck"] else []
        elif isinstance(part, Mlp):
            kept += [part.fc2] if how["bottleneck"] else []
    kept += [module.patch_embed] if how["bottleneck"] else []
    scores = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    pruner = tp.pruner.BasePruner(
        module,
        torch.zeros(1, 3, *model.preprocess.size),
        importance=scores[how["score"]](),
        global_pruning=how["global"],
        isomorphic=how["isomorphic"],
        pruning_ratio=pruning_ratio,
        ignored_layers=kept,
        num_heads=heads,
        prune_head_dims=True,
        round_to=8,
    )
    for name, parameter in module.named_parameters():
        parameter.grad = gradients(how["score"]).get(name)
    for group in pruner.step(interactive=True) or ():
        group.prune()
    for part in module.modules():
        if isinstance(part, Attention):
            part.num_heads = pruner.num_heads[part.qkv]
            part.head_dim = part.qkv.out_features // (3 * part.num_heads)
            part.attn_dim = part.num_heads * part.head_dim
    module.zero_grad()
    return module.requires_grad_(False)


def halves_of_attention(model: Model, context: Context) -> Iterator[tuple[str, Model]]:
    """Without half of attention's parameters, by head and by matrix."""
    comcat = registry.technique("comcat").from_settings({"ratio": 0.5})
    yield "comcat", pipeline.run(model, Recipe((comcat,)), context)
    yield PER_MATRIX, per_matrix(model, 0.5)


def blocks_of_zeros(model: Model, context: Context) -> Iterator[tuple[str, Model]]:
    """With blocks of zeros that stand for 30% of the MACs, chosen by loss and by size."""
    ways = {
        "lpvit": LPViT(prune_ratio=0.3),
        "lpvit, with power": LPViT(prune_ratio=0.3, power=True),
        "magnitude of blocks": SmallestBlocks(prune_ratio=0.3),
    }
    for name, technique in ways.items():
        yield name, pipeline.run(model, Recipe((technique,)), context)


class SmallestBlocks(LPViT):
    """LPViT with squared weights in the place of its losses: blocks go by their magnitude."""

    def losses(self, model: Model, context: Context) -> list[Tensor]:
        maps = linears(view(model.module))
        return [block_sums(map_.weight.detach().double().square(), self.block) for map_ in maps]


def fewer_paths(model: Model, context: Context, gone: int = 3, draws: int = 5) -> Iterator[tuple[str, Model]]:
    """Without the paths of least influence, and without as many attentions and MLPs that are drawn, of equal MACs."""
    chosen = pipeline.run(model, Recipe((PathEnsemble(paths=gone),)), context)
    yield "path_ensemble", chosen
    plain = PathEnsemble(paths=gone, scale=False)
    cut = chosen.steps[-1].record["cut"]
    rng, every = np.random.default_rng(context.seed), paths_of(len(view(model.module).blocks))
    drawn = []
    for _ in range(draws):
        its = list[list[Any]]()
        for part in ("attention", "mlp"):
            of = [[*path] for path in every if path.part == part]
            its += [of[i] for i in rng.permutation(len(of))[: sum(p == part for _, p in cut)]]
        drawn.append(sorted(its))
    for name, paths in {"least influence": cut, **{f"drawn, {i}": its for i, its in enumerate(drawn)}}.items():
        done = model.copy()
        plain.restore_(done, {"cut": paths, "scaled": False})
        yield f"{name}, not weighed", done


def fewer_blocks(model: Model, context: Context) -> Iterator[tuple[str, Model]]:
    """Without a quarter of the blocks, dropped, and fused into those before them."""
    for name, fuse in (("dropped", False), ("fusegpt", True)):
        technique = FuseGPT(blocks=len(view(model.module).blocks) // 4, fuse=fuse)
        yield name, pipeline.run(model, Recipe((technique,)), context)


CLAIMS: Mapping[str, Callable[[Model, Context], Iterator[tuple[str, Model]]]] = {
    "Half of attention's parameters, by head and by matrix": halves_of_attention,
    "Blocks of zeros for 30% of the MACs": blocks_of_zeros,
    "Three of the attentions and MLPs left out": fewer_paths,
    "A quarter of the blocks left out": fewer_blocks,
}
"""What papers claim beside one other way, without training."""
