"""What can't be captured is one clear error, wherever in capturing it fails."""

import pytest
import torch
from torch import Tensor, nn

from martlet.core.errors import SourceError
from martlet.graph.trace import capture


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class Named(nn.Module):
    """Its parameter's name is one that a graph module has taken."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.graph


@pytest.mark.parametrize(("module", "said"), [(Branches(), "Branches"), (Named(), "'graph' already exists")])
def test_what_cannot_be_captured_is_refused(module, said):
    with pytest.raises(SourceError, match=said):
        capture(module, torch.ones(2, 3))
