"""Images of any size and shape, packed into sequences of one length: timm's NaFlexVit without its padding.

timm pads each image of a batch to the longest. Here several stand in one sequence, each sees itself alone, and shapes
are static: so many sequences, of so many tokens, with so many images at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from timm.models.naflexvit import NaFlexVit, batch_patchify
from torch import Tensor, nn

from martlet.core.errors import SourceError, UsageError
from martlet.data.packing import first_fit, padding_ratio


class Packed(NamedTuple):
    """Images in sequences, as `PackedViT` takes them.

    patches: (S, L, P), 0 where no patch is. added: (S, L, C), positions of patches, and register tokens.
    images: (S, L), the number of the image in its sequence, from 1; 0 is padding.
    pool: (S, K, L), the weights of each image's mean.
    places: of each image in order, its sequence and its number there, from 0. padding_ratio: of all tokens.
    """

    patches: Tensor
    added: Tensor
    images: Tensor
    pool: Tensor
    places: list[tuple[int, int]]
    padding_ratio: float

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.patches, self.added, self.images, self.pool

    def logits(self, packed: Tensor) -> Tensor:
        """Those of each image (N, K), in order, from those of the sequences."""
        return torch.stack([packed[place] for place in self.places])


class PackedViT(nn.Module):
    """A NaFlexVit on packed images: (S, images, classes) from what `pack` gives.

    Attention is masked block by block, one block an image; the mean of its patches goes to the head. The modules are
    the model's own. Scores of all pairs in a sequence are computed, masked ones too, so a sequence that holds a few
    images is better than one that holds many.

    Source: Dehghani et al., Patch n' Pack: NaViT, 2023, arXiv 2307.06304, section 2.

    Raises:
        SourceError: the model has rotary positions, a class token, or a head that reads more than the mean of patches.
    """

    def __init__(self, model: NaFlexVit) -> None:
        super().__init__()
        odd = {
            "rotary positions": model.rope is not None,
            "a class token": model.embeds.cls_token is not None,
            f"a head that pools by {model.global_pool!r}": model.attn_pool is not None or model.global_pool != "avg",
            "register tokens in its mean": model.pool_include_prefix and model.num_prefix_tokens > 0,
            "a norm or a convolution in its embedding": not model.embeds.is_linear
            or not isinstance(model.embeds.norm, nn.Identity)
            or model.embeds.norm_input is not None,
        }
        if found := [what for what, there in odd.items() if there]:
            raise SourceError(f"images can't be packed for {type(model).__name__} with {' and '.join(found)}")
        self.model = model

    def forward(self, patches: Tensor, added: Tensor, images: Tensor, pool: Tensor) -> Tensor:
        model = self.model
        is_patch = pool.sum(1, keepdim=True).mT != 0  # (S, L, 1)
        x = cast(nn.Module, model.embeds.proj)(patches) * is_patch.to(patches.dtype) + added
        x = model.norm_pre(x)
        mask = (images[:, None, :, None] == images[:, None, None]).to(x.dtype)  # (S, 1, L, L); padding sees padding
        mask = (1 - mask) * torch.finfo(x.dtype).min
        for block in model.blocks:
            x = block(x, attn_mask=mask)
        return model.head(model.head_drop(model.fc_norm(pool @ model.norm(x))))

    def pack(
        self,
        images: Sequence[Tensor],
        length: int,
        most: int,
        *,
        drop_ratio: float = 0.0,
        seed: int = 0,
        sequences: int | None = None,
    ) -> Packed:
        """Images (3, H, W) into sequences of `length` tokens, first fit, at most `most` in each.

        drop_ratio: the share of each image's patches, drawn at random, that is left out; the others keep their places.
        NaViT trains so; a model that wasn't loses by it. sequences: how many there are, the last of them empty if need
        be; None for as many as it takes.

        Raises:
            UsageError: no image, a side that is no multiple of the patch, an image that is too long, more sequences
                than there are, or a ratio that leaves nothing.
        """
        if not images:
            raise UsageError("there are no images to pack")
        if not 0 <= drop_ratio < 1:
            raise UsageError(f"drop_ratio is {drop_ratio}; it can be from 0 to less than 1")
        generator = torch.Generator().manual_seed(seed)
        parts = [self._embedded(i, image, drop_ratio, generator) for i, image in enumerate(images)]
        lengths = [len(added) for _, added in parts]
        found = first_fit(lengths, length, most)
        count = len(found) if sequences is None else sequences
        if len(found) > count:
            raise UsageError(
                f"{len(images)} images take {len(found)} sequences of {length} tokens, and there are {count}"
            )
        like, prefix = parts[0][1], self.model.num_prefix_tokens
        patches = like.new_zeros(count, length, parts[0][0].shape[-1])
        added = like.new_zeros(count, length, like.shape[-1])
        numbers = torch.zeros(count, length, dtype=torch.long, device=like.device)
        pool = like.new_zeros(count, most, length)
        places = [(0, 0)] * len(images)
        for s, members in enumerate(found):
            at = 0
            for k, i in enumerate(members):
                end = at + lengths[i]
                patches[s, at + prefix : end] = parts[i][0]
                added[s, at:end] = parts[i][1]
                numbers[s, at:end] = k + 1
                pool[s, k, at + prefix : end] = 1 / (lengths[i] - prefix)
                places[i], at = (s, k), end
        return Packed(patches, added, numbers, pool, places, padding_ratio(lengths, count, length))

    @torch.no_grad()
    def _embedded(
        self, number: int, image: Tensor, drop_ratio: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The patches (n, P) that stay, and what is added (registers + n, C), registers first."""
        embeds, prefix = cast(Any, self.model.embeds), self.model.num_prefix_tokens
        size = embeds.patch_size
        if image.shape[-2] % size[0] or image.shape[-1] % size[1]:
            raise UsageError(
                f"image {number} is {image.shape[-2]} × {image.shape[-1]}; its sides must be multiples of {size[0]} "
                f"and {size[1]}"
            )
        patches, (down, across) = batch_patchify(image[None], size, channels_last=embeds.channels_last)
        patches = patches.flatten(2)  # (1, n, P)
        rows, columns = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
        coord = torch.stack([rows.flatten(), columns.flatten()], -1)[None].to(image.device)  # (1, n, 2)
        nothing = torch.zeros_like(patches)
        added, _ = embeds(nothing, patch_coord=coord, patch_valid=torch.ones_like(coord[..., 0], dtype=torch.bool))
        added = torch.cat([added[:, :prefix], added[:, prefix:] - embeds.proj(nothing)], 1)[0]
        keep = torch.arange(down * across)
        if drop_ratio:
            left = max(round(len(keep) * (1 - drop_ratio)), 1)
            keep = torch.randperm(len(keep), generator=generator)[:left].sort().values
        return patches[0, keep], torch.cat([added[:prefix], added[prefix:][keep]])
