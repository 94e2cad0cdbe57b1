"""fuse and the fold of batch norms give the logits of the untouched model, on random batch-norm statistics."""

import copy

import pytest
import timm
import torch
from torch import nn

from martlet.core.errors import ArtifactError, NumericsError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.data.preprocess import Preprocess
from martlet.graph.rewrite import fold
from martlet.graph.trace import trace
from martlet.techniques.fuse.fuse import Fuse, reparameterize_

RELATIVE_ERROR = 1e-4


class ConvNet(nn.Module):
    """Batch norms that fold and that mustn't: without affine, after a sum, of a shared layer, over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_bn = nn.BatchNorm2d(8, affine=False)
        self.twice = nn.Conv2d(8, 8, 1)
        self.twice_bn = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 1)
        self.shared_bn = nn.BatchNorm2d(8)
        self.last_bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 6, bias=False)
        self.linear_bn = nn.BatchNorm1d(6)
        self.tokens = nn.Linear(6, 6)
        self.tokens_bn = nn.BatchNorm1d(4)
        self.flat = nn.Linear(6, 6)
        self.flat_bn = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise_bn(self.depthwise(self.stem(x)))
        y = self.twice(x)
        x = self.twice_bn(y) + y
        x = self.shared_bn(self.shared(x)) + self.shared(x)
        x = self.last_bn(x + 1).mean((2, 3))  # (B, 8)
        x = self.linear_bn(self.linear(x))
        x = self.tokens_bn(self.tokens(x[:, None].expand(-1, 4, -1)))  # (B, 4, 6): its channels are the tokens
        x = self.flat_bn(self.flat(x).flatten(0, 1)).reshape_as(x)  # (B, 4, 6): as in LeViT
        return self.head(x.mean(1))


def randomize_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a new model leave every batch norm the identity; these statistics make each one matter."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            assert child.running_mean is not None
            assert child.running_var is not None
            child.running_mean.normal_(0, 0.3, generator=generator)
            child.running_var.uniform_(0.5, 2, generator=generator)
            if child.affine:
                nn.init.uniform_(child.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(child.bias, 0, 0.3, generator=generator)
    return module.eval()


def build(name: str, size: int, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    module = ConvNet() if name == "conv_net" else timm.create_model(name, num_classes=10)
    preprocess = Preprocess(size=(size, size))
    return Model(name=name, module=randomize_(module, seed), preprocess=preprocess, num_classes=10, origin={})


def logits(model: Model, batch: int = 2) -> torch.Tensor:
    images = torch.randn(batch, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return copy.deepcopy(model.module)(images)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


HOSTS = [
    ("fastvit_t8", 64, "MobileOneBlock.reparameterize"),
    ("repvit_m1", 64, "RepVggDw.fuse"),
    ("mobileone_s0", 64, "MobileOneBlock.reparameterize"),
    ("efficientvit_m5", 224, "ConvNorm.fuse"),
    ("levit_128s", 224, "LinearNorm.fuse"),
    ("shvit_s1", 64, "Conv2dNorm.fuse"),
]


@pytest.mark.parametrize(("name", "size", "method"), HOSTS)
def test_host_rewrites_keep_the_logits(name: str, size: int, method: str) -> None:
    model = build(name, size)
    expected = logits(model)
    record = Fuse().apply_(model, Context())
    assert relative_error(logits(model), expected) < RELATIVE_ERROR
    assert record["methods"][method] > 0
    assert record["fused"] == sum(record["methods"].values())
    assert record["batch_norms"]["after"] < record["batch_norms"]["before"] / 2


@pytest.mark.parametrize(("name", "size"), [("fastvit_t8", 64), ("levit_128s", 224)])
def test_restore_gives_a_structure_that_takes_the_fused_weights(name: str, size: int) -> None:
    model, other = build(name, size), build(name, size, seed=1)
    record = Fuse().apply_(model, Context())
    Fuse().restore_(other, record)
    other.module.load_state_dict(model.module.state_dict(), strict=True)
    assert torch.equal(logits(other), logits(model))


def test_restore_refuses_a_library_that_fuses_otherwise() -> None:
    record = Fuse().apply_(build("mobileone_s0", 64), Context())
    with pytest.raises(ArtifactError, match="MobileOneBlock"):
        Fuse().restore_(build("conv_net", 16), record)


def test_nothing_to_fuse_is_said() -> None:
    model = build("test_vit", 160)
    expected = logits(model)
    record = Fuse().apply_(model, Context())
    assert record == {"fused": 0, "methods": {}, "batch_norms": {"before": 0, "after": 0}}
    assert torch.equal(logits(model), expected)


def test_a_rewrite_that_changes_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.byobnet import MobileOneBlock

    right = MobileOneBlock._get_kernel_bias
    monkeypatch.setattr(MobileOneBlock, "_get_kernel_bias", lambda self: (right(self)[0] * 1.1, right(self)[1]))
    with pytest.raises(NumericsError, match=r"MobileOneBlock\.reparameterize"):
        Fuse().apply_(build("mobileone_s0", 64), Context())


@pytest.mark.parametrize("fault", [1.0, 1.001])
def test_what_rounding_explains_is_no_change(monkeypatch: pytest.MonkeyPatch, fault: float) -> None:
    """Logits enlarged until the rounding of the rewrite is 4e-3 of them, as it is in deep models at random."""
    from timm.models.byobnet import MobileOneBlock

    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))  # what the technique looks at
    model, twin = build("mobileone_s0", 64), build("mobileone_s0", 64)
    right, forward = MobileOneBlock._get_kernel_bias, model.module.forward
    with torch.no_grad():
        before = forward(image)
        reparameterize_(twin.module)
        rounding = (twin.module(image) - before).norm()
    monkeypatch.setattr(MobileOneBlock, "_get_kernel_bias", lambda self: (right(self)[0] * fault, right(self)[1]))
    monkeypatch.setattr(model.module, "forward", lambda x: 1 + (forward(x) - before) * 4e-3 * 10**0.5 / rounding)
    if fault == 1:
        assert Fuse().apply_(model, Context())["fused"] > 0
    else:
        with pytest.raises(NumericsError, match="changes the logits"):
            Fuse().apply_(model, Context())


def test_fuse_of_a_class_that_is_not_timms_is_left_alone() -> None:
    class Merge(nn.Module):
        def fuse(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return image + text

    module = nn.Sequential(Merge(), nn.Linear(2, 2))
    assert reparameterize_(module).total() == 0
    assert isinstance(module[0], Merge)


def test_facts_say_what_it_breaks() -> None:
    assert Fuse.requires == {Fact.MODULE, Fact.UNFUSED}
    assert Fuse.breaks == {Fact.UNFUSED}


def batch_norms(graph_module: torch.fx.GraphModule) -> int:
    return sum("batch_norm" in str(node.target) for node in graph_module.graph.nodes)


@pytest.mark.parametrize(("name", "size", "left"), [("conv_net", 16, 4), ("mobilevitv2_050", 64, 0)])
def test_folding_the_graph_keeps_the_logits(name: str, size: int, left: int) -> None:
    """Left are those after a sum, of a layer shared or read twice, and over tokens."""
    model = build(name, size)
    expected = logits(model)
    graph_module = trace(model.module, model.preprocess.size)
    fold.fold_batch_norms_(graph_module)
    assert batch_norms(graph_module) == left
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_error(graph_module(images), expected) < RELATIVE_ERROR
    read = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
    assert not [key for key in graph_module.state_dict() if key.endswith("running_var") and key not in read]


def test_a_folded_graph_takes_the_weights_of_another() -> None:
    graph_modules = [trace(build("conv_net", 16, seed).module, (16, 16)) for seed in (0, 1)]
    for graph_module in graph_modules:
        fold.fold_batch_norms_(graph_module)
    graph_modules[1].load_state_dict(graph_modules[0].state_dict(), strict=True)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(graph_modules[1](images), graph_modules[0](images))


@pytest.mark.usefixtures("no_trace_is_remembered")
def test_this_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that forgets the mean is seen by the comparison."""
    right = fold.fuse_conv_bn_weights

    def wrong(weight, bias, mean, *rest):
        return right(weight, bias, torch.zeros_like(mean), *rest)

    monkeypatch.setattr(fold, "fuse_conv_bn_weights", wrong)
    model = build("conv_net", 16)
    expected = logits(model)
    graph_module = trace(model.module, (16, 16))
    fold.fold_batch_norms_(graph_module)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_error(graph_module(images), expected) > 100 * RELATIVE_ERROR
