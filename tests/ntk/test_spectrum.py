"""Reports on kernels: zeros that are known, conditions that are named, alignments in closed form."""

import math

import pytest
import torch
from torch import nn

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.ntk import TwoLayerReLU, alignment, circle_spectrum, jacobian_gram, kernel_report, relu_kernel
from vifamily.rng import generator, scoped

DOUBLE = torch.float64


def angles(count):
    return 2 * math.pi * torch.arange(count, dtype=DOUBLE) / count


def circle(count):
    return torch.stack([angles(count).cos(), angles(count).sin()], dim=1)


def test_the_circle_has_its_known_zeros_and_eigenvalues() -> None:
    x = circle(64)
    report = kernel_report(relu_kernel(x), x)
    known = circle_spectrum(3)
    assert report.zeros == 30 and not report.positive_definite and report.condition == math.inf
    # sums over 64 points take in the eigenvalues of harmonics 64 apart, of order 1e-7
    for got, wanted in zip(report.eigenvalues[[0, 1, 2, 3, 4]], known[[0, 1, 1, 2, 2]], strict=True):
        assert float(got) == pytest.approx(float(wanted), abs=2e-6)
    assert len(report.opposite) == 32 and report.odd_rank == 2.0
    words = str(report)
    assert "not strictly positive definite" in words and "30 of 64" in words
    assert "opposite inputs" in report.note() and "linear functions" in report.note()


def test_a_constant_coordinate_makes_it_definite_and_badly_conditioned() -> None:
    x = torch.cat([circle(64), torch.ones(64, 1, dtype=DOUBLE)], dim=1)
    report = kernel_report(relu_kernel(x), x)
    assert report.positive_definite and report.zeros == 0 and not report.opposite
    assert 1e-8 < report.smallest < 1e-6
    assert "badly conditioned" in report.note()


def test_collinear_and_repeated_inputs_are_named(seed) -> None:
    x = torch.randn(6, 3, generator=generator(seed, "x"), dtype=DOUBLE)
    x = torch.cat([x, 2.5 * x[1:2], x[3:4]])
    net = TwoLayerReLU(3, 200, 1, generator=generator(seed, "net"), readout="normal")
    report = kernel_report(jacobian_gram(net, x), x)
    assert report.collinear == ((1, 6),) and report.repeated == ((3, 7),) and report.proportional == 1
    assert report.zeros == 2
    assert "proportional" in report.note() and "occur twice (3 and 7)" in report.note()
    with scoped(generator(seed, "biased")):
        biased = nn.Sequential(nn.Linear(3, 200, dtype=DOUBLE), nn.Tanh(), nn.Linear(200, 1, dtype=DOUBLE))
    other = kernel_report(jacobian_gram(biased, x[:7]), x[:7])
    assert other.proportional == 0 and other.positive_definite
    assert "biases keep them apart" in other.note()


def test_block_form_is_exact_where_the_readout_starts_at_zero(seed) -> None:
    x = torch.randn(5, 3, generator=generator(seed, "x"), dtype=DOUBLE)
    zero = TwoLayerReLU(3, 16, 2, generator=generator(seed, "net"))
    assert kernel_report(jacobian_gram(zero, x), x).block < 1e-12
    normal = TwoLayerReLU(3, 16, 2, generator=generator(seed, "net"), readout="normal")
    report = kernel_report(jacobian_gram(normal, x), x)
    assert report.block > 1e-3
    assert "moves the others" in report.note()


def test_distance_from_a_scalar_kernel_in_closed_form() -> None:
    # one input, blocks diag(3, 1): the scalar part is 2 I, what is left diag(1, -1), so sqrt(2 / 10)
    report = kernel_report(torch.diag(torch.tensor([3.0, 1.0], dtype=DOUBLE)), torch.ones(1, 2, dtype=DOUBLE))
    assert report.block == pytest.approx(math.sqrt(0.2), abs=1e-12)
    assert report.effective_rank == pytest.approx(1.6, abs=1e-12)
    assert report.condition == pytest.approx(3.0, abs=1e-12)


def test_alignment_of_a_cube_is_a_tenth_out_of_reach() -> None:
    # cos^3 = 3/4 cos + 1/4 cos 3u: the third harmonic, a tenth of the square, has eigenvalue zero
    found = alignment(relu_kernel(circle(64)), circle(64)[:, :1] ** 3)
    assert found.outside == pytest.approx(0.1, abs=1e-10)
    assert float(found.power[-1]) == pytest.approx(0.9, abs=1e-10)
    assert float(found.power[2]) == pytest.approx(0.9, abs=1e-10)  # the constant comes first, then both first harmonics
    assert "out of reach" in str(found)


def test_alignment_with_an_eigenvector() -> None:
    gram = torch.diag(torch.tensor([3.0, 4.0], dtype=DOUBLE))
    assert alignment(gram, torch.tensor([[1.0], [0.0]], dtype=DOUBLE)).cosine == pytest.approx(0.6, abs=1e-12)


@pytest.mark.parametrize("form", [lambda r: r.to_dict(), lambda r: r.table(), lambda r: r.plot(), repr])
def test_a_report_has_its_forms(form) -> None:
    x = circle(8)
    assert form(kernel_report(relu_kernel(x), x))


EYE = torch.eye(4, dtype=DOUBLE)


@pytest.mark.parametrize(
    ("gram", "inputs", "options", "kind", "words"),
    [
        (EYE[:3], 4, {}, ShapeError, "square"),
        (EYE, 3, {}, ShapeError, "multiple of 3"),
        (EYE * float("nan"), 4, {}, DataError, "not finite"),
        (EYE + torch.triu(torch.ones(4, 4, dtype=DOUBLE), 1), 4, {}, DataError, "not symmetric"),
        (torch.diag(torch.tensor([1.0, -1.0], dtype=DOUBLE)), 2, {}, DataError, "none below zero"),
        (EYE, 4, {"tolerance": -1.0}, ConfigError, "tolerance"),
        (EYE, 0, {}, ShapeError, "at least one input"),
    ],
)
def test_what_is_no_kernel_is_refused(gram, inputs, options, kind, words) -> None:
    with pytest.raises(kind, match=words):
        kernel_report(gram, torch.ones(inputs, 2, dtype=DOUBLE), **options)


def test_a_target_of_another_size_is_refused() -> None:
    with pytest.raises(ShapeError, match="4 entries"):
        alignment(EYE, torch.ones(3, dtype=DOUBLE))
    with pytest.raises(ShapeError, match="not all zero"):
        alignment(EYE, torch.zeros(4, dtype=DOUBLE))
