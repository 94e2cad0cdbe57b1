"""Compound scaling: the published multipliers give timm's own models, and coefficients double the MACs."""

import pytest
import timm
import torch

from martlet.core.errors import SourceError
from martlet.measure.macs import macs_run
from martlet.models.compound import (
    EFFICIENTNET,
    Coefficients,
    Scale,
    compound_scale,
    create_scaled,
    families,
    fit_coefficients,
    grid,
)

PHI = {"b1": 0.5, "b2": 1, "b3": 2, "b4": 3.5, "b5": 5, "b6": 6, "b7": 7}


def params(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("efficientnet_b0", "efficientnet_b3") else pytest.param(n, marks=pytest.mark.slow)
        for n in EFFICIENTNET
    ],
)
def test_published_multipliers_give_timms_parameters(name):
    with torch.device("meta"):
        assert params(create_scaled("efficientnet", EFFICIENTNET[name])) == params(timm.create_model(name))


def test_published_multipliers_are_those_of_the_equation_rounded():
    for name, phi in PHI.items():
        published, scale = EFFICIENTNET[f"efficientnet_{name}"], compound_scale(phi)
        assert published.depth == pytest.approx(scale.depth, rel=0.15), name
        assert published.width == pytest.approx(scale.width, rel=0.06), name
        assert published.resolution == pytest.approx(scale.resolution, rel=0.05), name


def test_a_scale_by_hand():
    scale = compound_scale(2, Coefficients(depth=1.5, width=1.0, resolution=1.2))
    assert (scale.depth, scale.width, scale.resolution) == (2.25, 1.0, pytest.approx(1.44))
    assert scale.image_size() == 322  # 224 · 1.44 = 322.56
    assert compound_scale(0) == Scale()
    assert Coefficients().growth == pytest.approx(1.92, abs=0.01)


def test_fitted_coefficients_double_the_macs_of_another_network():
    def mobilenet(scale):
        with torch.device("meta"):
            return macs_run(create_scaled("mobilenet_v2", scale).eval(), (scale.image_size(),) * 2)

    by = fit_coefficients(lambda scale: -abs(scale.depth - 1.3) - abs(scale.width - 1.1))
    assert (by.depth, by.width) == (1.3, 1.1)
    assert by.growth == pytest.approx(2, abs=0.1)
    plain = mobilenet(Scale())
    for phi in (1, 2):
        assert mobilenet(compound_scale(phi, by)) / plain == pytest.approx(2**phi, rel=0.2)


def test_the_grid_keeps_the_growth():
    found = list(grid())
    assert len(found) > 10
    assert all(abs(by.growth - 2) <= 0.1 for by in found)
    assert Coefficients(depth=1.2, width=1.1, resolution=1.15) in found
    assert fit_coefficients(lambda scale: scale.depth).depth == max(by.depth for by in found)


def test_bad_input_is_one_clear_line():
    assert {"efficientnet", "efficientnet_lite", "mobilenet_v2"} <= set(families())
    with pytest.raises(SourceError, match=r"no 'mobilenetv2' can be scaled; did you mean mobilenet_v2"):
        create_scaled("mobilenetv2", Scale())
    with pytest.raises(SourceError, match=r"at least 1, not 0\.9, 1\.1, 1\.15"):
        Coefficients(depth=0.9)
