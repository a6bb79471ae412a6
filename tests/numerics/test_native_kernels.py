"""What is done in C between compiled steps gives the numbers of its counterparts in Python."""

import numpy as np
import pytest
import torch

from vifamily.numerics.mcse import mcse
from vifamily.numerics.native import _kernels, _library, kernels
from vifamily.numerics.rhat import split_rhat
from vifamily.rng import NoiseStream, native_sobol
from vifamily.types import NoiseSpec


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    _kernels.kernels.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIFAMILY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
    _kernels.kernels.cache_clear()


@pytest.fixture
def found():
    """The functions, compiled here where there is a compiler."""
    out = kernels()
    if out is None:
        pytest.skip("there is no C compiler")
    return out


def chains(rows, correlation):
    source = torch.Generator().manual_seed(rows)
    out = torch.randn(rows, 6, generator=source, dtype=torch.float64)
    for i in range(1, rows):
        out[i] += correlation * out[i - 1]
    out[:, 1] += torch.linspace(0, 4, rows, dtype=torch.float64)
    out[:, 2] = 1e6 + 1e-3 * out[:, 2]
    out[:, 3] = 2.0
    out[: rows // 4, 4] += 1e5
    return out


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 64), (3, 100), (40, 192), (7, 1), (11, 2048)])
def test_points_are_those_of_the_engine(found, size, count):
    seeds = (5, 2**60, 2**63 - 1)
    engines = [torch.quasirandom.SobolEngine(size, scramble=True, seed=s) for s in seeds]
    expected = torch.cat([e.draw(count, dtype=torch.float64) for e in engines])
    assert torch.equal(native_sobol(seeds, size, count), expected)


@pytest.mark.parametrize("restarts", [1, 3])
def test_the_noise_of_a_fit_is_the_same_with_and_without(found, restarts):
    spans = [
        NoiseStream(3, NoiseSpec((5,)), draws=2, restarts=restarts, balanced=True, native=native).span(37, 400)
        for native in (True, False)
    ]
    assert torch.equal(*spans)


@pytest.mark.parametrize("correlation", [0.0, 0.9, -0.5])
@pytest.mark.parametrize("rows", [8, 9, 41, 400])
def test_monte_carlo_errors(found, rows, correlation):
    chain = chains(rows, correlation)
    expected = mcse(chain)
    scale = chain.abs().amax(0)
    assert bool(
        ((torch.from_numpy(found.mcse(chain.numpy())) - expected).abs() <= 1e-9 * expected + 1e-14 * scale).all()
    )


def test_monte_carlo_errors_of_numbers_that_are_not_finite(found):
    chain = chains(40, 0.0).numpy()
    chain[7, 0], chain[9, 1] = np.inf, np.nan
    assert np.isnan(found.mcse(chain)).tolist() == [True, True, False, False, False, False]


def test_r_hat_of_several_windows(found):
    chain = chains(401, 0.3)
    widths = [40, 80, 111, 200, 380]  # the half of one is the whole of another
    got = found.worst_rhat(chain.numpy(), widths, np.zeros(6))
    for width, value in zip(widths, got, strict=True):
        assert value == pytest.approx(float(split_rhat(chain[-width:]).max()), rel=1e-6)
    still = found.worst_rhat(chain[:, 1:2].numpy(), widths, np.full(1, 20.0))
    assert still.tolist() == [1.0] * 5
    chain[390, 0] = torch.nan
    assert np.isfinite(found.worst_rhat(chain.numpy(), widths, np.zeros(6))).all()


def test_without_a_compiler_the_counterparts_serve(monkeypatch, tmp_path):
    monkeypatch.setattr(_library.shutil, "which", lambda name: None)
    monkeypatch.setenv("VIFAMILY_CACHE_DIR", str(tmp_path))
    _kernels.kernels.cache_clear()
    try:
        assert kernels() is None
        engine = torch.quasirandom.SobolEngine(2, scramble=True, seed=9)
        assert torch.equal(native_sobol([9], 2, 64), engine.draw(64, dtype=torch.float64))
    finally:
        _kernels.kernels.cache_clear()
