"""The wavelets reconstruct, and their bands are what filters and quads say; what each band is mixed by."""

import pytest
import torch

from martlet.models.svt import HIGH, LOW, ComplexMlp, Scattering


def filtered(line, taps):
    """(N,) in float64, mirrored at both ends, tap by tap."""
    n, out = len(line), torch.zeros(len(line), dtype=torch.float64)
    mirrored = torch.cat([line.flip(0), line, line.flip(0)]).double()
    for i in range(n):
        for offset in range(1 - len(taps), len(taps)):
            out[i] += taps[abs(offset)] * mirrored[n + i + offset]
    return out


def image_filtered(image, rows, columns):
    once = torch.stack([filtered(row, rows) for row in image])
    return torch.stack([filtered(column, columns) for column in once.T]).T


@pytest.mark.parametrize("size", [(12, 16), (56, 56)])
def test_synthesis_reconstructs(size):
    layer, x = Scattering(4, size), torch.randn(2, 3, *size)
    low, real, imaginary = layer.analyze(x)
    assert (layer.synthesize(low, real, imaginary) - x).abs().max() < 1e-5
    assert (layer.synthesize(low, imaginary, real) - x).abs().max() > 0.1
    assert (low.shape, real.shape) == ((2, 3, *size), (2, 6, 3, size[0] // 2, size[1] // 2))


def test_bands_are_filters_and_quads():
    layer, x = Scattering(4, (12, 14)), torch.randn(1, 1, 12, 14)
    low, real, imaginary = layer.analyze(x)
    assert torch.allclose(low[0, 0].double(), image_filtered(x[0, 0], LOW, LOW), atol=1e-6)
    for band, (rows, columns) in enumerate([(HIGH, LOW), (LOW, HIGH), (HIGH, HIGH)]):
        y = image_filtered(x[0, 0], rows, columns) / 2**0.5
        a, b, c, d = y[::2, ::2], y[::2, 1::2], y[1::2, ::2], y[1::2, 1::2]
        pair = [(a - d, b + c), (a + d, b - c)]
        for tree, (re, im) in enumerate(pair):
            assert torch.allclose(real[0, band + 3 * tree, 0].double(), re, atol=1e-6)
            assert torch.allclose(imaginary[0, band + 3 * tree, 0].double(), im, atol=1e-6)


def test_complex_layers_are_complex():
    layer, (real, imaginary) = ComplexMlp(3, 4), torch.randn(2, 2, 3, 4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    weight, bias = (torch.complex(*pair.detach()) for pair in (layer.weight1, layer.bias1))
    hidden = torch.einsum("bgi,gio->bgo", torch.complex(real, imaginary), weight) + bias
    hidden = torch.complex(hidden.real.relu(), hidden.imag.relu())
    weight, bias = (torch.complex(*pair.detach()) for pair in (layer.weight2, layer.bias2))
    expected = torch.einsum("bgi,gio->bgo", hidden, weight) + bias
    with torch.no_grad():
        assert torch.allclose(torch.complex(*layer(real, imaginary)), expected, atol=1e-5)
        assert not torch.allclose(torch.complex(*layer(imaginary, real)), expected, atol=1e-2)


def test_low_band_is_multiplied_and_the_other_half_convolved():
    layer, x = Scattering(8, (8, 8)), torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        for part in (layer.tokens, layer.channels):
            for parameter in part.parameters():
                parameter.zero_()  # no high bands
        y = layer(x)
        low, real, imaginary = layer.analyze(x[..., 4:].permute(0, 3, 1, 2))
        expected = layer.synthesize(low * layer.low, 0 * real, 0 * imaginary)
        assert torch.allclose(y[..., 1::2].permute(0, 3, 1, 2), expected, atol=1e-6)
        assert torch.allclose(y[..., ::2].permute(0, 3, 1, 2), layer.conv(x[..., :4].permute(0, 3, 1, 2)), atol=1e-6)
