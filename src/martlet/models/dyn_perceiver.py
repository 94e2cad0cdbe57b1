"""Dynamic Perceiver: a latent code beside any convolutional backbone, and exits that read only the code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from martlet.core.errors import SourceError
from martlet.models.backbone import cfg
from martlet.models.papers.paper import Paper, Stated
from martlet.nn.latent import Attend, Read, Shrink, Transfer

__all__ = ["DynPerceiver"]

PAPER = Paper(
    title="Dynamic Perceiver for Efficient Visual Recognition",
    authors="Han et al.",
    year=2023,
    arxiv="2306.11248",
    code="https://github.com/LeapLabTHU/Dynamic_Perceiver",
    license="MIT",
    models={
        "dyn_perceiver_regnety_008": Stated(params=None, macs=None, top1_pct=79.9),
        "dyn_perceiver_mobilenetv3_large_100": Stated(params=None, macs=None),
        "dyn_perceiver_resnet18": Stated(params=None, macs=None),
    },
    differs="The paper's abstract was at hand, not its text or figures; the dimensions are facts of the authors' code. "
    "Backbones are timm's, at full width.",
)

default_cfgs = generate_default_cfgs({name: cfg(first_conv=None, classifier="classifier") for name in PAPER.models})


@dataclass(frozen=True, kw_only=True)
class Host:
    """A backbone in five parts. dims, reductions: of what the stem and each of the four stages give."""

    stem: nn.Module
    stages: Sequence[nn.Module]
    dims: Sequence[int]
    reductions: Sequence[int]


def _of_regnet(model: Any) -> Host:
    info = model.feature_info
    return Host(
        stem=model.stem,
        stages=(model.s1, model.s2, model.s3, nn.Sequential(model.s4, model.final_conv)),
        dims=[its["num_chs"] for its in info],
        reductions=[its["reduction"] for its in info],
    )


def _of_resnet(model: Any) -> Host:
    return Host(
        stem=nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool),
        stages=(model.layer1, model.layer2, model.layer3, model.layer4),
        dims=[its["num_chs"] for its in model.feature_info],
        reductions=[4, *(its["reduction"] for its in model.feature_info[1:])],
    )


def _of_mobilenetv3(model: Any) -> Host:
    """Cut where the authors cut: after 2, 4, 7 and 13 blocks."""
    blocks = [block for stage in model.blocks for block in stage]
    cuts = (2, 4, 7, 13, len(blocks))
    stem = nn.Sequential(model.conv_stem, model.bn1, *blocks[:2])
    stages = [nn.Sequential(*blocks[start:end]) for start, end in pairwise(cuts)]
    dims = [blocks[cut].conv_pw.in_channels for cut in cuts[:-1]]
    return Host(stem=stem, stages=stages, dims=[*dims, model.num_features], reductions=[4, 8, 16, 32, 32])


HOSTS: Mapping[str, Callable[[Any], Host]] = MappingProxyType(
    {"regnet": _of_regnet, "resnet": _of_resnet, "mobilenetv3_large": _of_mobilenetv3}
)


class Write(nn.Module):
    """The features X (B, C, H, W) attend to the code (B, N, C'), in an eighth of their channels."""

    def __init__(self, dim: int, code_dim: int) -> None:
        super().__init__()
        self.cross = Attend(dim, other_dim=code_dim, inner=dim // 8)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.cross(x.flatten(2).mT, z).mT.unflatten(2, x.shape[-2:])


class DynPerceiver(nn.Module):
    """Han et al., "Dynamic Perceiver for Efficient Visual Recognition", arXiv:2306.11248.

    Images (B, 3, H, W), whose sides are multiples of `divisor`, to logits (B, K). Before each stage of the backbone the
    code reads its features and computes for itself; after each, the features read the code. Two exits stand on the
    code, and are known before the third and the fourth stage run. The last classifier reads the features, the code, and
    what the second exit thought.

    Args:
        host: A RegNet, ResNet or MobileNetV3-Large, by timm's name. host_args: of its constructor.
        tokens: Of the code, before the first stage; half as many before each that follows.
        depths: Blocks of the code before each stage. num_heads: theirs.
        grid: Features are pooled to grid × grid for the code.
        hidden: Channels of a layer before the last logits; 0 for none.

    Raises:
        SourceError: a host of no known kind.
    """

    def __init__(
        self,
        *,
        host: str = "regnety_008_tv",
        host_args: Mapping[str, Any] = MappingProxyType({}),
        in_chans: int = 3,
        tokens: int = 128,
        depths: tuple[int, int, int, int] = (3, 3, 9, 6),
        num_heads: tuple[int, int, int, int] = (1, 2, 4, 8),
        grid: int = 7,
        hidden: int = 0,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if global_pool not in ("", "avg"):
            raise SourceError(f"{type(self).__name__} takes the mean of its features and of its code: global_pool=avg")
        its = cut(host, in_chans=in_chans, **host_args)
        self.dims, self.hidden, self.num_classes = [*its.dims], hidden, num_classes
        self.divisor = grid * its.reductions[3]
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(its.dims[1:], its.reductions[1:], strict=True))
        ]
        *code_dims, features = self.dims
        self.latent = nn.Parameter(torch.zeros(1, tokens, code_dims[0]))
        self.stem, self.stages = its.stem, nn.ModuleList(its.stages)
        self.read = nn.ModuleList(
            Read(dim, (grid, grid), depth, heads)
            for dim, depth, heads in zip(code_dims, depths, num_heads, strict=True)
        )
        self.shrink = nn.ModuleList(Shrink(tokens >> i, code_dims[i], code_dims[i + 1]) for i in range(3))
        self.write = nn.ModuleList(Write(self.dims[i + 1], code_dims[min(i + 1, 3)]) for i in range(4))
        self.num_features = features + 2 * code_dims[3]
        self.head_hidden_size = hidden or self.num_features
        self.norm = nn.BatchNorm1d(self.num_features)
        self.before_logits = _hidden(self.num_features, hidden)
        self.drop = nn.Dropout(drop_rate)
        self._reset_exits(num_classes)
        self.classifier = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.latent, std=0.02)

    def _reset_exits(self, num_classes: int) -> None:
        *_, dim, last, features = self.dims
        self.exit1, self.transfer1 = nn.Linear(dim, num_classes), Transfer(num_classes, last)
        self.exit2, self.transfer2 = nn.Linear(2 * last, num_classes), Transfer(num_classes, last)
        self.own = nn.Sequential(_hidden(features, self.hidden), nn.Linear(self.hidden or features, num_classes))
        self.train(self.training)

    def get_classifier(self) -> nn.Module:
        """The Linear that gives the last logits."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New, random classifiers, the exits' too; 0 classes for no last one, and the exits as they are."""
        self.num_classes = num_classes
        if num_classes:
            self._reset_exits(num_classes)
        self.classifier = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def exits(self, x: Tensor) -> Iterator[Tensor]:
        """Logits (B, K), the earliest first: of the code before the stages 3 and 4, and of all.

        Each is computed when it is asked for, so whoever stops early runs no more. In training the backbone's own
        logits come before the last.
        """
        for what, value in self._walk(x):
            if what == "exit":
                yield value
            elif what == "pooled" and self.training:
                yield self.own(value)
            elif what == "features":
                yield self.forward_head(value)

    @torch.no_grad()
    def until(self, image: Tensor, confidence: float) -> tuple[Tensor, int]:
        """Of an image (1, 3, H, W) the logits (1, K) of the first exit as sure as `confidence`, else of the last.

        Returns them, and which exit it was, from 0.
        """
        taken = image, 0
        for number, logits in enumerate(self.exits(image)):
            taken = logits, number
            if logits.softmax(-1).max() >= confidence:
                break
        return taken

    def _walk(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What comes by on the way: logits at an exit, a stage's features, these pooled, and what is classified."""
        h, w = x.shape[-2:]
        if h % self.divisor or w % self.divisor:
            raise SourceError(
                f"this {type(self).__name__} takes images whose sides are multiples of {self.divisor}, not {h} × {w}"
            )
        code, x = self.latent.repeat(x.shape[0], 1, 1), self.stem(x)
        thought = mean = code.mean(1)
        for i, stage in enumerate(self.stages):
            code = self.read[i](code, x)
            mean = code.mean(1)
            if i == 2:
                thought = self.exit1(mean)
                yield "exit", thought
            if i == 3:
                thought = self.exit2(torch.cat([mean, self.transfer1(thought)], -1))
                yield "exit", thought
            x = stage(x)
            if i == 3:
                yield "pooled", x.mean((2, 3))
            else:
                code = self.shrink[i](code)
            x = self.write[i](x, code)
            yield "stage", x
        if len(self.stages) == 4:
            yield "features", self.norm(torch.cat([x.mean((2, 3)), mean, self.transfer2(thought)], -1))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> what the last classifier reads, (B, C)."""
        *_, (_, features) = self._walk(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives -> logits (B, K), or what comes before them."""
        x = self.before_logits(x)
        return x if pre_logits else self.classifier(self.drop(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What chosen stages of the backbone give, each (B, C, H, W); as timm's models have it."""
        if output_fmt != "NCHW":
            raise ValueError(f"stages give NCHW, not {output_fmt}")
        taken, last = feature_take_indices(len(self.stages), indices)
        found, features = [], x
        for what, value in self._walk(x):
            if what == "stage":
                found.append(value)
            elif what == "features":
                features = value
            if stop_early and len(found) > last:
                break
        found = [stage for i, stage in enumerate(found) if i in taken]
        return found if intermediates_only else (features, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops stages that `indices` don't need; as timm's models have it."""
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0)
        return taken


def cut(name: str, **kwargs: Any) -> Host:
    """A backbone of timm in five parts.

    kwargs: of its constructor.

    Raises:
        SourceError: one that can't be cut.
    """
    kind = next((kind for kind in HOSTS if name.startswith(kind)), None)
    if kind is None or not timm.is_model(name):
        raise SourceError(f"no host {name!r}: it is a model of timm whose name begins with {', '.join(HOSTS)}")
    return HOSTS[kind](timm.create_model(name, **kwargs))


def _hidden(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.Hardswish()) if hidden else nn.Identity()


def _make(name: str, pretrained: bool, kwargs: dict[str, Any], **dims: Any) -> DynPerceiver:
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(DynPerceiver, name, pretrained, feature_cfg=features, **(dims | kwargs))


@register_model
def dyn_perceiver_regnety_008(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """On RegNetY-800MF."""
    dims: dict[str, Any] = {"host": "regnety_008_tv", "depths": (3, 3, 9, 6)}
    return _make("dyn_perceiver_regnety_008", pretrained, kwargs, **dims)


@register_model
def dyn_perceiver_mobilenetv3_large_100(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """On MobileNetV3-Large."""
    dims: dict[str, Any] = {"host": "mobilenetv3_large_100", "depths": (3, 3, 9, 9), "hidden": 1280}
    return _make("dyn_perceiver_mobilenetv3_large_100", pretrained, kwargs, **dims)


@register_model
def dyn_perceiver_resnet18(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """On ResNet-18."""
    return _make("dyn_perceiver_resnet18", pretrained, kwargs, host="resnet18", depths=(3, 3, 9, 3))
