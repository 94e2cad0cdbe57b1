"""What becomes of tokens before they are merged into others, learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from martlet.functional.tokens import Pairs, pick, product, reactivate


class Reactivation(nn.Module):
    """Changes the tokens that join others, by what is known of each pair: the norm of the sum of its two.

    Begins as nothing. tokens: (r,), one for each pair, the best match first. channels: (C,).
    Source: Xiong et al., PYRA, 2024, arXiv 2403.09192.
    """

    def __init__(self, width: int, pairs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.tokens, self.channels = nn.Parameter(torch.empty(pairs)), nn.Parameter(torch.zeros(width))
        nn.init.uniform_(self.tokens, -1, 1)

    def forward(self, x: Tensor, size: Tensor | None, pairs: Pairs) -> Tensor:
        """From tokens (B, N, C), and their sizes (B, N) unless each counts as one, to as many."""
        weighed = x if size is None else x * size[..., None]
        source, destination = (
            product(chosen, pick(weighed, numbers))
            for chosen, numbers in ((pairs.leaving, pairs.sources), (pairs.joined, pairs.destinations))
        )  # (B, r, C)
        own = product(pairs.leaving, pick(x, pairs.sources))  # (B, r, C)
        change = reactivate(own, self.norm(source + destination), self.tokens, self.channels) - own
        none = x.new_zeros(1, 1, 1).expand(x.shape[0], 1, x.shape[2])  # no len(), which a trace takes for a constant
        changes = torch.cat([product(pairs.leaving.mT, change), none], 1)  # (B, S + 1, C)
        places = {number: i for i, number in enumerate(pairs.sources)}
        return x + pick(changes, [places.get(number, len(places)) for number in range(x.shape[1])])
