"""fuse: training-time branches become the one convolution or Linear that computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from martlet.core.errors import ArtifactError, NumericsError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage, Technique

METHODS = ("fuse", "reparameterize", "switch_to_deploy")
"""How modules offer to rewrite themselves for inference; `fuse` returns what takes the module's place."""

MAX_RELATIVE_ERROR = 1e-3
"""Of the logits, in the Euclidean norm. Rounding gives under 1e-6 on timm's hybrids; a forgotten term, over 1e-2."""

MAX_ROUNDINGS, MAX_ROUNDED = 10, 1e-2
"""Or so many times what the logits move by when the image changes in its last digit, up to the second: deep models with
random weights can make a thousand times as much of rounding as trained ones."""


@dataclass(frozen=True, kw_only=True)
class Fuse(Technique):
    """Rewrite the model for inference, exactly, as its own library provides.

    Parallel convolutions, identities and their batch norms (RepVGG, MobileOne, FastViT, RepViT) become one
    convolution; batch norms around convolutions and Linear layers (LeViT, EfficientViT, SHViT, TinyViT) vanish into
    them. The batch norms that are left follow a convolution in plain sequence: tracing folds those of every model, so
    they need no technique. Always right for inference; never before training or fine-tuning.

    Shape: none changes.
    Needs: nothing. The logits of one image of noise are compared before and after.
    Cost: two forward passes; at run time, fewer layers.
    Paper: Ding et al., RepVGG, 2021, arXiv 2101.03697, section 3.3; Jacob et al., 2018, arXiv 1712.05877, section 3.2.
    Differs: nothing known; the arithmetic is the host library's.
    Raises: NumericsError if the rewritten model gives other logits; ArtifactError on reloading with a library that
        rewrites otherwise.
    """

    name: ClassVar[str] = "fuse"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "merge training-time branches and batch norms into single layers"
    paper: ClassVar[str] = "Ding et al., RepVGG: Making VGG-style ConvNets Great Again, 2021, arXiv 2101.03697"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.UNFUSED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.UNFUSED})

    def space(self) -> Choices:
        return Choices(always=True)

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        images = torch.randn(1, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(context.seed))
        expected, before = _logits(model.module, images), _batch_norms(model.module)
        methods = reparameterize_(model.module)
        fused = _logits(model.module, images)
        error = _relative(fused, expected)
        if not (error <= MAX_RELATIVE_ERROR or error <= _rounding(model.module, images, fused)):  # NaN too
            raise NumericsError(
                f"fuse changes the logits of {model.name} by {float(error):.1%} (through {', '.join(methods)}); "
                "leave fuse out of the recipe"
            )
        return {
            "fused": methods.total(),
            "methods": dict(sorted(methods.items())),
            "batch_norms": {"before": before, "after": _batch_norms(model.module)},
        }

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        methods = dict(reparameterize_(model.module))
        if methods != record["methods"]:
            raise ArtifactError(
                f"fuse was {record['methods'] or 'nothing'} when {model.name} was saved, and is {methods or 'nothing'} "
                "with the library installed here; install the version in report.json"
            )


def reparameterize_(module: nn.Module) -> Counter[str]:
    """Calls, on every submodule that has one, its own rewrite for inference. Returns the calls by `Class.method`.

    As `timm.utils.reparameterize_model`, except that `fuse`, a word with other meanings, is called on timm's classes
    only, and that what takes a module's place is visited too.
    """
    calls: Counter[str] = Counter()
    module.eval()
    with torch.no_grad():
        for name, child in list(module.named_children()):
            method = next((method for method in METHODS if _offers(child, method)), None)
            if method:
                calls[f"{type(child).__name__}.{method}"] += 1
                result = getattr(child, method)()
                if method == "fuse":
                    setattr(module, name, result)
                    child = result
            calls += reparameterize_(child)
    return calls


def _offers(module: nn.Module, method: str) -> bool:
    from_timm = any(base.__module__.partition(".")[0] == "timm" for base in type(module).__mro__)
    return callable(getattr(module, method, None)) and (method != "fuse" or from_timm)


def _logits(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits in inference mode. Entering training mode in between empties caches of what follows from the weights."""
    with torch.no_grad():
        logits = module.train().eval()(images)
    module.train().eval()
    return logits


def _relative(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (logits - expected).norm() / expected.norm().clamp(min=torch.finfo().tiny)


def _rounding(module: nn.Module, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """How far rounding alone may have moved the logits (B, K) that the module gives for these images."""
    moved = _relative(_logits(module, images * (1 + torch.finfo().eps)), logits)
    return (MAX_ROUNDINGS * moved).clamp(max=MAX_ROUNDED)


def _batch_norms(module: nn.Module) -> int:
    return sum(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())
