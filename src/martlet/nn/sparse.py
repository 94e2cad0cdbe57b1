"""Products with weights that are mostly zero: 1 × 1 convolutions that read only the others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

ENOUGH = 0.8
"""The share of zeros from which on PyTorch's product of sparse rows is faster than its dense one (docs/kernels.md)."""
LEAST = 1_000_000
"""Of a dense product's multiplications for an image: with fewer, to begin costs more than zeros save."""

_library = torch.library.Library("martlet", "FRAGMENT")
_library.define("sparse_conv1x1(Tensor x, Tensor rows, Tensor columns, Tensor values, Tensor? bias) -> Tensor")


def _sparse_conv1x1(x: Tensor, rows: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    outputs = len(rows) - 1
    weight = torch.sparse_csr_tensor(rows, columns, values, (outputs, x.shape[1]), check_invariants=False)
    found = torch.stack([weight @ image for image in x.flatten(2).contiguous()])
    if bias is not None:
        found += bias[:, None]
    return found.unflatten(2, x.shape[2:])


_library.impl("sparse_conv1x1", _sparse_conv1x1, "CPU")
SPARSE_CONV1X1 = torch.ops.martlet.sparse_conv1x1


@torch.library.register_fake("martlet::sparse_conv1x1")
def _(x: Tensor, rows: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], rows.shape[0] - 1, *x.shape[2:])


class SparseConv2d(nn.Module):
    """A 1 × 1 convolution for inference, float32 on a CPU: (B, I, H, W) to (B, O, H, W) by rows of its nonzeros."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            weight = conv.weight.detach().flatten(1).to_sparse_csr()
        self.register_buffer("rows", weight.crow_indices().int())
        self.register_buffer("columns", weight.col_indices().int())
        self.register_buffer("values", weight.values())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return SPARSE_CONV1X1(x, self.rows, self.columns, self.values, self.bias)


def pointwise(module: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """The 1 × 1 convolutions that read every channel of a picture, and how many places (H · W) theirs has.

    Left out is what has a single place, such as a squeeze and excitation. Runs an image of zeros of `size`.
    """
    found: dict[str, int] = {}

    def sees(name: str) -> object:
        def hook(_module: nn.Module, _args: object, out: Tensor) -> None:
            if (places := out.shape[-2] * out.shape[-1]) > 1:
                found[name] = places

        return hook

    plain = {"kernel_size": (1, 1), "stride": (1, 1), "groups": 1, "padding": (0, 0)}
    handles = [
        each.register_forward_hook(sees(name))  # type: ignore[arg-type]
        for name, each in module.named_modules()
        if isinstance(each, nn.Conv2d) and all(getattr(each, key) == value for key, value in plain.items())
    ]
    parameter = next(module.parameters(), torch.zeros(()))
    mode = module.training
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, 3, *size, dtype=parameter.dtype, device=parameter.device))
    finally:
        module.train(mode)
        for handle in handles:
            handle.remove()
    return found


def use_zeros_(module: nn.Module, size: tuple[int, int]) -> Mapping[str, float]:
    """Lets those 1 × 1 convolutions skip their zeros that are faster so. Returns the share of zeros of each.

    module: float32 on a CPU, that takes images of `size` (H, W).
    """
    mostly = {
        name: share
        for name, each in module.named_modules()
        if isinstance(each, nn.Conv2d) and (share := float((each.weight == 0).float().mean())) >= ENOUGH
    }
    places = pointwise(module, size) if mostly else {}
    used = {}
    for name, share in mostly.items():
        conv = module.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        if places.get(name, 0) * conv.weight.numel() >= LEAST:
            module.set_submodule(name, SparseConv2d(conv))
            used[name] = share
    return used


def sparse_names(graph_module: GraphModule) -> dict[Node, str]:
    """The products of a traced graph that skip zeros, and the layers that they are."""
    return {
        node: str(node.args[1].target).removesuffix(".rows")
        for node in graph_module.graph.nodes
        if getattr(node.target, "overloadpacket", None) is SPARSE_CONV1X1
    }
