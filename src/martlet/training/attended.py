"""What a block of a vision transformer attends to while the model is tuned, whatever has been put into it since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.functional.hints import attention_scores
from martlet.vit.reading import check_global
from martlet.vit.view import LinearView, Part, view

HOLDS = "inner"
"""What layers that are put in call what they hold."""


@dataclass(frozen=True)
class Sight:
    """Where the query and key of a block are given, before anything is put in.

    query, key: by name of their module, from which of its features, and after the norm of which name, if any.
    features: of the whole module. grid: patches (down, across), which are the last tokens.
    """

    query: tuple[str, int, str | None]
    key: tuple[str, int, str | None]
    features: int
    num_heads: int
    head_dim: int
    scale: float
    grid: tuple[int, int]

    @classmethod
    def of(cls, model: Model, block: int, asker: str) -> Sight:
        """Of a block, from 0.

        Raises:
            SourceError: no vision transformer, or one whose attention is inside windows.
            RecipeError: fewer blocks, an attention that doesn't show query and key, or patches without a grid.
        """
        vit = view(model.module)
        check_global(vit, asker)
        if block >= len(vit.blocks):
            last = len(vit.blocks) - 1
            raise RecipeError(
                f"{asker}: {model.name} has {last + 1} blocks, and none is {block}; it can be 0 to {last}"
            )
        attention, grid, (h, w) = vit.blocks[block].attention, vit.tokens.grid, model.preprocess.size
        if any(its.weight_name != "weight" for its in (attention.query, attention.key)):
            raise RecipeError(
                f"{asker}: {attention.name} of {model.name} doesn't show what it attends to; take timm's or Hugging "
                "Face's model"
            )
        with torch.no_grad():
            embedded = vit.patch_embed.module(torch.zeros(1, 3, h, w))
        if grid is None or embedded.numel() != grid[0] * grid[1] * vit.embed_dim:
            raise RecipeError(
                f"{asker}: images of {h} × {w} pixels aren't those that the patches of {model.name} were made for; "
                "load it for this image size"
            )
        return cls(
            _place(attention.query, attention.query_norm),
            _place(attention.key, attention.key_norm),
            attention.query.module.weight.shape[0],  # type: ignore[union-attr, arg-type]
            attention.num_heads,
            attention.head_dim,
            attention.scale,
            grid,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sight:
        """From what `to_json` gave."""
        places = {name: tuple(data[name]) for name in ("query", "key", "grid")}
        return cls(**{**data, **places})  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[Seen]:
        """What the module gives, and the block's query and key, of each forward pass until the end."""
        named = {_before(name): its for name, its in module.named_modules()}  # of what holds a module, the module
        seen = Seen(self, {name: named[name] for _, _, name in (self.query, self.key) if name is not None})
        with ExitStack() as stack:
            for name in {self.query[0], self.key[0]}:
                stack.callback(named[name].register_forward_hook(partial(seen.keep, name)).remove)
            stack.callback(module.register_forward_hook(seen.keep_logits).remove)
            yield seen


class Seen:
    """Of one forward pass. logits: (B, K), as the module gave them."""

    logits: Tensor

    def __init__(self, sight: Sight, norms: Mapping[str, nn.Module]) -> None:
        self.sight, self.norms = sight, norms
        self._given: dict[str, Tensor] = {}

    def keep(self, name: str, _module: nn.Module, _inputs: object, out: Tensor) -> None:
        self._given[name] = out.detach()

    def keep_logits(self, _module: nn.Module, _inputs: object, out: Tensor) -> None:
        self.logits = out

    @torch.no_grad()
    def scores(self) -> Tensor:
        """How much the patch in the middle attends to each (B, N), over all heads; without what isn't a patch.

        Raises:
            RecipeError: heads were cut since.
        """
        (down, across), scale = self.sight.grid, self.sight.scale
        query, keys = (self._heads(*place) for place in (self.sight.query, self.sight.key))  # (B, H, N, D)
        middle = (down - 1) // 2 * across + (across - 1) // 2
        return attention_scores(query[:, :, middle - down * across], keys, scale)[:, -down * across :]

    def _heads(self, name: str, first: int, norm: str | None) -> Tensor:
        given, (heads, dim) = self._given[name], (self.sight.num_heads, self.sight.head_dim)
        if given.shape[-1] != self.sight.features:
            raise RecipeError(
                f"attention at {name} can't be compared with what it was, for heads were cut meanwhile; tune with lora"
            )
        its = given[..., first : first + heads * dim].unflatten(-1, (heads, dim)).transpose(1, 2)  # (B, H, N, D)
        return its if norm is None else self.norms[norm](its)


def _place(its: LinearView, norm: Part | None) -> tuple[str, int, str | None]:
    return its.name, its.rows.start, None if norm is None else norm.name


def _before(name: str) -> str:
    """The name before anything was put in."""
    return ".".join(part for part in name.split(".") if part != HOLDS)
