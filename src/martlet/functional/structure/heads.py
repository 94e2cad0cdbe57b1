"""What attention and MLP compute, as tensors by head and by unit; and what is left when some of them are cut.

Whoever cuts works on these, and knows no module. `select` is plain deletion; `score_bases` and `value_bases` cut in
other coordinates than those that a model happens to have, which the products of attention allow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The maps of one attention: H heads, D dimensions of q and k, E of v, C features of a token.

    q, k: (H, D, C); v: (H, E, C); proj: (C, H, E); q_bias, k_bias: (H, D); v_bias: (H, E); proj_bias: (C,).
    position: (H, N, N), added to the scores of a window; None where attention is global.
    """

    q: Tensor
    q_bias: Tensor
    k: Tensor
    k_bias: Tensor
    v: Tensor
    v_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    position: Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.q.shape[0]

    @property
    def qk_dim(self) -> int:
        return self.q.shape[1]

    @property
    def v_dim(self) -> int:
        return self.v.shape[1]

    def features(self, kept: Tensor) -> HeadWeights:
        """For tokens of which the features of these numbers (C',) are left."""
        maps = (self.q[..., kept], self.q_bias, self.k[..., kept], self.k_bias, self.v[..., kept], self.v_bias)
        return HeadWeights(*maps, self.proj[kept], self.proj_bias[kept], self.position)

    def heads(self, kept: Tensor) -> HeadWeights:
        """The heads of these numbers (H',) alone."""
        return replace(
            self,
            **{name: getattr(self, name)[kept] for name in ("q", "q_bias", "k", "k_bias", "v", "v_bias")},
            proj=self.proj[:, kept],
            position=None if self.position is None else self.position[kept],
        )

    def scores_by(self, query: Tensor, key: Tensor) -> HeadWeights:
        """q A and k B in the place of q and k. query, key: A and B (H, D, D')."""
        return replace(
            self,
            q=torch.einsum("hdc,hde->hec", self.q, query),
            q_bias=torch.einsum("hd,hde->he", self.q_bias, query),
            k=torch.einsum("hdc,hde->hec", self.k, key),
            k_bias=torch.einsum("hd,hde->he", self.k_bias, key),
        )

    def values_by(self, into: Tensor, out: Tensor) -> HeadWeights:
        """v A in the place of v, from which proj gets A B. into: A (H, E, E'); out: B (H, E', E)."""
        return replace(
            self,
            v=torch.einsum("hdc,hde->hec", self.v, into),
            v_bias=torch.einsum("hd,hde->he", self.v_bias, into),
            proj=torch.einsum("chd,hed->che", self.proj, out),
        )


@dataclass(frozen=True, eq=False)
class UnitWeights:
    """The maps of one MLP with U hidden units.

    fc1, gate: (U, C); fc1_bias, gate_bias: (U,); fc2: (C, U); fc2_bias: (C,); norm, norm_bias: (U,), of the norm over
    hidden units. None where there is none.
    """

    fc1: Tensor
    fc1_bias: Tensor | None
    fc2: Tensor
    fc2_bias: Tensor | None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    norm: Tensor | None = None
    norm_bias: Tensor | None = None

    @property
    def num_units(self) -> int:
        return self.fc1.shape[0]

    def features(self, kept: Tensor) -> UnitWeights:
        """For tokens of which the features of these numbers (C',) are left."""
        return replace(
            self,
            fc1=self.fc1[:, kept],
            gate=None if self.gate is None else self.gate[:, kept],
            fc2=self.fc2[kept],
            fc2_bias=None if self.fc2_bias is None else self.fc2_bias[kept],
        )

    def reading(self, factor: Tensor, shift: Tensor) -> UnitWeights:
        """That give for x what these give for factor x + shift, (C,) each. Their maps have biases."""

        def moved(bias: Tensor | None, rows: Tensor | None) -> Tensor | None:
            return None if bias is None or rows is None else bias + rows @ shift

        return replace(
            self,
            fc1=self.fc1 * factor,
            fc1_bias=moved(self.fc1_bias, self.fc1),
            gate=None if self.gate is None else self.gate * factor,
            gate_bias=moved(self.gate_bias, self.gate),
        )

    def beside(self, other: UnitWeights) -> UnitWeights:
        """These units and the other ones, which read the same tokens; their outputs are added up."""

        def both(x: Tensor | None, y: Tensor | None, dim: int = 0) -> Tensor | None:
            return None if x is None or y is None else torch.cat([x, y], dim)

        bias = None if self.fc2_bias is None or other.fc2_bias is None else self.fc2_bias + other.fc2_bias
        return UnitWeights(
            torch.cat([self.fc1, other.fc1]),
            both(self.fc1_bias, other.fc1_bias),
            torch.cat([self.fc2, other.fc2], 1),
            bias,
            both(self.gate, other.gate),
            both(self.gate_bias, other.gate_bias),
        )

    def onto(self, fc2: Tensor, fc2_bias: Tensor | None) -> UnitWeights:
        """With another second Linear."""
        return replace(self, fc2=fc2, fc2_bias=fc2_bias)

    def units(self, kept: Tensor) -> UnitWeights:
        """The units of these numbers (U',) alone."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[kept]

        return UnitWeights(
            self.fc1[kept],
            rows(self.fc1_bias),
            self.fc2[:, kept],
            self.fc2_bias,
            rows(self.gate),
            rows(self.gate_bias),
            rows(self.norm),
            rows(self.norm_bias),
        )


def selection(kept: Tensor, size: int) -> Tensor:
    """(H, D, D') of ones and zeros, which picks from `size` dimensions D of each head those of numbers (H, D')."""
    return torch.nn.functional.one_hot(kept, size).mT.double()
