"""dependency: channels of any network that can be traced are cut, with all that hangs on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage, Technique
from martlet.nn.refit import refit_
from martlet.vit.budget import total_macs

STEPS = 7
"""In which the share of channels is halved towards the one that removes as many MACs as asked."""
Cuts = list[tuple[str, bool, list[int]]]
"""Of each group of channels the layer that it is named by, whether its outputs go or its inputs, and their numbers."""


@dataclass(frozen=True, kw_only=True)
class Dependency(Technique):
    """Cut channels of convolutions and Linears with the norms, depthwise convolutions and sums that hang on them.

    For networks of convolutions and hybrids, which channels go together is found by Torch-Pruning from a trace; what
    is left is a plain, smaller network. Attention stays as it is, and so does what gives the logits. Then each layer is
    fitted to what the whole network's gave, in closed form. A vision transformer that can be taken apart loses less
    by `ziplm`.

    Args:
        prune_ratio: share of the model's MACs to remove, at least; 0 removes nothing.
        repair: refit layers to the calibration images; False only cuts.
        multiple: channels that are left are multiples of it; kernels work on so many at once.

    Shape: unchanged outside; channels inside.
    Needs: calibration images, without labels; Torch-Pruning, which reloading needs too.
    Cost: at compress time, a trace for each of seven ratios, and two forward passes of the images for each layer; at
        run time, less than before.
    Paper: Fang et al., DepGraph: Towards Any Structural Pruning, 2023, arXiv 2301.12900, by its library.
    Differs: what a group is worth, the size of its weights, is compared in all layers at once. What stays is fitted in
        closed form, where the paper trains.
    Raises: RecipeError without Torch-Pruning, for a ratio that would empty layers, or a model that it can't trace.
    """

    name: ClassVar[str] = "dependency"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "cut channels of any network, with all that hangs on them"
    paper: ClassVar[str] = "Fang et al., DepGraph: Towards Any Structural Pruning, 2023, arXiv 2301.12900"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.ALL_TOKENS, Fact.WHOLE_LINEARS, Fact.ONE_EXIT})
    needs_images: ClassVar[bool] = True

    prune_ratio: float = 0.2
    repair: bool = True
    multiple: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.prune_ratio < 1:
            raise RecipeError(f"dependency: prune_ratio is from 0 to less than 1, not {self.prune_ratio}")
        if self.multiple < 1:
            raise RecipeError(f"dependency: multiple is at least 1, not {self.multiple}")

    def space(self) -> Choices:
        return Choices(settings={"prune_ratio": (0.1, 0.2, 0.3, 0.4)})

    def check(self, model: Model) -> None:
        library()

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        images = context.calibration(self)
        if not self.prune_ratio:
            return {"cuts": []}
        whole, total = copy.deepcopy(model.module).eval(), total_macs(model)
        cuts = self._search(model, total, context)
        kept = cut_(model, cuts)
        if self.repair:
            order = _order(model)
            first = min((order.index(name) for name in kept if name in order), default=0)
            refit_(model.module.eval(), whole, kept, order[first:], images, progress=context.progress)
        return {"cuts": [[name, out, numbers] for name, out, numbers in cuts]}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        if record["cuts"]:
            cut_(model, [(name, out, numbers) for name, out, numbers in record["cuts"]])

    def _search(self, model: Model, total: int, context: Context) -> Cuts:
        """Cuts of the least share of channels that removes as many MACs."""
        low, high, found, most = 0.0, 1.0, None, 0.0
        for step in range(STEPS):
            context.progress("choosing channels", step, STEPS)
            middle, twin = (low + high) / 2, model.copy()
            cuts = self._cuts(twin, middle)
            removed = 1 - total_macs(twin) / total
            most = max(most, removed)
            low, high, found = (middle, high, found) if removed < self.prune_ratio else (low, middle, cuts)
        if found is None:
            raise RecipeError(
                f"dependency: prune_ratio {self.prune_ratio:g} would empty layers of {model.name}; at most "
                f"{most:.0%} of the MACs can go"
            )
        return found

    @torch.enable_grad()
    def _cuts(self, twin: Model, share: float) -> Cuts:
        """Cuts a copy, and returns what was cut."""
        tp, module = library(), twin.module.eval().requires_grad_(True)
        pruner = tp.pruner.BasePruner(
            module,
            torch.zeros(1, 3, *twin.preprocess.size),
            importance=tp.importance.GroupMagnitudeImportance(),
            global_pruning=True,
            pruning_ratio=share,
            max_pruning_ratio=0.9,
            ignored_layers=untouched(module, twin.num_classes),
            round_to=self.multiple,
        )
        names, cuts = {id(each): name for name, each in module.named_modules()}, Cuts()
        for group in pruner.step(interactive=True) or ():
            root, numbers = group[0]
            if not numbers:
                continue
            out = pruner.DG.is_out_channel_pruning_fn(root.handler)
            cuts.append((names[id(root.target.module)], out, [int(i) for i in numbers]))
            group.prune()
        return cuts


def library() -> Any:
    """Torch-Pruning.

    Raises:
        RecipeError: it isn't installed.
    """
    try:
        import torch_pruning
    except ImportError:
        raise RecipeError("dependency needs Torch-Pruning: pip install 'martlet[prune]'") from None
    return torch_pruning


@torch.enable_grad()
def cut_(model: Model, cuts: Cuts) -> dict[str, list[int]]:
    """Cuts groups one after the other. Returns, by layer that lost outputs, which of those it had are left.

    Raises:
        RecipeError: the network can't be traced.
    """
    tp, module = library(), model.module.eval()
    names, kept = {id(each): name for name, each in module.named_modules()}, dict[str, list[int]]()
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(True)
    try:
        graph = tp.DependencyGraph().build_dependency(module, torch.zeros(1, 3, *model.preprocess.size))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            f"dependency: Torch-Pruning can't trace {model.name} ({str(error).splitlines()[0]}); leave it out"
        ) from error
    for name, out, numbers in cuts:
        layer = module.get_submodule(name)
        handler = graph.get_pruner_of_module(layer)
        prune = handler.prune_out_channels if out else handler.prune_in_channels
        group = graph.get_pruning_group(layer, prune, idxs=numbers)
        for dependency, gone in group:
            its = dependency.target.module
            if graph.is_out_channel_pruning_fn(dependency.handler) and isinstance(its, nn.Linear | nn.Conv2d):
                its_name = names[id(its)]
                left = kept.get(its_name, list(range(its.weight.shape[0])))
                drop = set(gone)
                kept[its_name] = [number for i, number in enumerate(left) if i not in drop]
        group.prune()
    for parameter in module.parameters():
        parameter.requires_grad_(flags.get(parameter, True)).grad = None
    return kept


def untouched(module: nn.Module, num_classes: int) -> list[nn.Module]:
    """What isn't cut: layers in attention, and those that give the logits."""
    found = list[nn.Module]()
    for each in module.modules():
        if "attention" in type(each).__name__.lower() or "attn" in type(each).__name__.lower():
            found += [layer for layer in each.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        elif isinstance(each, nn.Linear | nn.Conv2d) and each.weight.shape[0] == num_classes:
            found.append(each)
    return found


def _order(model: Model) -> list[str]:
    """Linears and convolutions, as they are run."""
    found, handles = list[str](), []
    for name, layer in model.module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            handles.append(layer.register_forward_hook(lambda *_, name=name: found.append(name)))
    try:
        with torch.no_grad():
            model.module(torch.zeros(1, 3, *model.preprocess.size))
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(found))
