"""Agreement of restarts."""

import pytest
import torch

from vifamily.diagnostics.restarts import restart_rhat
from vifamily.errors import ShapeError


def test_agreement_and_disagreement(generator):
    x = torch.randn(4, 1000, 3, generator=generator, dtype=torch.float64)
    x[0, :, 1] += 1.0  # another mean
    x[0, :, 2] *= 3.0  # another spread alone
    found = restart_rhat(x)
    assert float(found[0]) < 1.01
    assert float(found[1]) > 1.05
    assert float(found[2]) > 1.05


def test_units_do_not_matter(generator):
    x = torch.randn(3, 200, 1, generator=generator, dtype=torch.float64)
    rough = restart_rhat((3 * x).exp())
    # ranks, and so the first part, are unchanged; folding is not, but both agree that these agree
    assert float(rough) < 1.02


def test_heavy_tails_do_not_hide_a_shift(generator):
    noise = torch.randn(2, 1000, 1, generator=generator, dtype=torch.float64)
    cauchy = noise / torch.randn(2, 1000, 1, generator=generator, dtype=torch.float64)
    cauchy[0] += 3
    assert float(restart_rhat(cauchy)) > 1.2


def test_non_finite_and_constant(generator):
    x = torch.randn(2, 10, 2, generator=generator, dtype=torch.float64)
    x[0, 0, 0] = torch.nan
    x[:, :, 1] = 7.0
    found = restart_rhat(x)
    assert bool(found[0].isnan())
    assert float(found[1]) == 1.0


@pytest.mark.parametrize("shape", [(1, 10, 2), (2, 3, 2), (2, 10)])
def test_bad_shapes(shape):
    with pytest.raises(ShapeError, match="two restarts"):
        restart_rhat(torch.zeros(shape))
