"""adalog: the grid of what a convolution reads is the one whose output errs least, found slowly, in float64."""

import torch
from tiny import Smooth
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core.technique import silent
from martlet.functional.quantize.search import search_affine, squared_error
from martlet.graph.fit import Call, fit
from martlet.graph.sites import sites
from martlet.graph.trace import trace
from martlet.techniques.quantize.adalog import CONVOLVED, AdaLog

IMAGES = torch.cat(list(Smooth()))
BITS = 3


class Uneven(nn.Module):
    """A depthwise convolution between two others, whose weights make little of the channel with the largest values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.out = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 5, 1)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        with torch.no_grad():
            self.stem.weight[0] *= 3
            self.deep.weight[0] *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.deep(nn.functional.silu(self.stem(x)))).mean((2, 3))


def calls() -> dict[str, Call]:
    graph_module = trace(Uneven().eval(), (32, 32)).requires_grad_(False)
    assert isinstance(graph_module, GraphModule)
    seen: dict[str, Call] = {}
    method = AdaLog(weight_bits=BITS, activation_bits=BITS)

    def decide(call: Call):
        seen[call.site.name] = call
        return method.decide(call)

    fit(graph_module, list(sites(graph_module)), IMAGES, decide, False, silent)
    return seen


def slow_error(call: Call, scale: float, zero: float) -> float:
    """Mean squared error of a depthwise convolution's output, for a grid of its input, one image after another."""
    [operand] = call.operands.values()
    total, count = 0.0, 0
    for image in operand.value[:: len(operand.value) // CONVOLVED][:CONVOLVED].double():
        codes = (torch.round(image / scale) + zero).clamp(0, 2**BITS - 1)
        moved = (codes - zero) * scale - image
        output = torch.zeros_like(image)
        padded = nn.functional.pad(moved, (1, 1, 1, 1))
        assert call.weight is not None
        for c in range(image.shape[0]):
            for i in range(3):
                for j in range(3):
                    window = padded[c, i : i + image.shape[1], j : j + image.shape[2]]
                    output[c] += call.weight[c, 0, i, j].double() * window
        total, count = total + float(output.square().sum()), count + output.numel()
    return total / count


def test_what_a_convolution_reads_is_rounded_for_its_output() -> None:
    call = calls()["deep"]
    [position], [operand] = call.operands, call.operands.values()
    quantizer = AdaLog(weight_bits=BITS, activation_bits=BITS).decide(call).operands[position]
    scale, zero = float(quantizer.scale), float(quantizer.offset)  # type: ignore[arg-type]
    found = slow_error(call, scale, zero)
    low, high = float(operand.value.min()), float(operand.value.max())
    steps = [(high - low) / (2**BITS - 1) * factor / 40 for factor in range(1, 44)]
    best = min(slow_error(call, step, code) for step in steps for code in range(2**BITS))
    assert found <= 1.1 * best
    by_itself = search_affine(squared_error(operand.value), operand.value, BITS)
    assert slow_error(call, by_itself.scale, by_itself.zero_point) > 1.3 * found  # the comparison can fail


def test_a_convolutions_weight_is_rounded_for_its_output() -> None:
    """Each output channel (O) gets the scale and zero point with which its output errs least, tried one by one."""
    call = calls()["out"]
    [position], [operand] = call.operands, call.operands.values()
    assert call.weight is not None
    method = AdaLog(weight_bits=BITS, activation_bits=BITS)
    fitted = method.decide(call)
    few = operand.value[:: len(operand.value) // CONVOLVED][:CONVOLVED].double()
    rounded = fitted.operands[position](few.float()).double()
    exact = torch.einsum("oc,bchw->obhw", call.weight[:, :, 0, 0].double(), few)

    def errors(weight: Tensor) -> Tensor:
        moved = torch.einsum("oc,bchw->obhw", weight[:, :, 0, 0].double(), rounded) - exact
        return moved.square().flatten(1).mean(1)

    best = torch.full((5,), torch.inf, dtype=torch.float64)
    spans = call.weight.flatten(1).amax(1) - call.weight.flatten(1).amin(1)
    for factor in range(4, 44):
        for zero in range(-7, 15):
            scale = (spans / 7 * factor / 40).reshape(-1, 1, 1, 1)
            tried = ((call.weight / scale).round() + zero).clamp(0, 7) - zero
            best = torch.minimum(best, errors(tried * scale))
    assert fitted.weight is not None
    found, by_itself = errors(fitted.weight()), errors(method.weight(call)())
    assert float(best.sum()) <= float(found.sum()) <= 1.5 * float(best.sum())
    assert float(by_itself.sum()) > 1.5 * float(best.sum())  # the comparison can fail


def test_an_image_is_rounded_for_itself() -> None:
    call = calls()["stem"]
    [position], [operand] = call.operands, call.operands.values()
    assert operand.kind == "image"
    method = AdaLog(weight_bits=BITS, activation_bits=BITS)
    chosen, own = method.decide(call).operands[position], method.activation(operand)
    assert torch.equal(chosen(operand.value), own(operand.value))
