"""The arc length between draws and a reference, against values by quadrature."""

import math

import pytest
import torch

from vifamily.diagnostics import arc_length
from vifamily.errors import ConfigError, DataError, ShapeError


@pytest.mark.parametrize(("shift", "scale", "length"), [(1.0, 1.0, 1.546469), (0.0, 2.0, 1.516167), (1, 0.5, 1.646311)])
def test_values_by_quadrature(generator, shift, scale, length):
    x = shift + scale * torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    y = torch.randn(3000, 1, generator=generator, dtype=torch.float64)
    found = arc_length(x, y, generator=generator)
    assert abs(found.value - length) < 5 * found.error


def test_draws_of_one_distribution_and_the_symmetry(generator):
    x, y = (torch.randn(1000, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    one = arc_length(x, y, generator=generator)
    assert abs(one.value - math.sqrt(2)) < 0.02
    far = [arc_length(*pair, generator=generator).value for pair in ((x + 1, y), (y, x + 1))]
    assert far[0] == pytest.approx(far[1], abs=0.02)


def test_a_generator_repeats_the_value():
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    one, two = (arc_length(x, x + 1, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert one == two


def test_bad_input_is_refused(generator):
    x = torch.zeros(20, 2)
    with pytest.raises(ShapeError, match="10 draws"):
        arc_length(x[:9], x, generator=generator)
    for folds in (1, 2.5):
        with pytest.raises(ConfigError, match="folds"):
            arc_length(x, x, generator=generator, folds=folds)
    with pytest.raises(ShapeError, match="columns"):
        arc_length(x, torch.zeros(20, 3), generator=generator)
    with pytest.raises(DataError, match="NaN"):
        arc_length(x, x * math.nan, generator=generator)
