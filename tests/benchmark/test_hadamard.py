"""The timings of the transform and of layers made of it, in their short mode."""

import pytest
import torch

from vifamily.benchmark import Options, benchmark_named
from vifamily.benchmark.hadamard import _kronecker
from vifamily.numerics.hadamard import hadamard


@pytest.mark.parametrize(("name", "floor", "sides"), [
    ("hadamard", "copy_us", ("torch", "known", "torch_to_known", "dense_h", "dense_w", "rfft")),
    ("whvi", "linear_us", ("sampled", "local", "shared", "per_example")),
    ("networks", "deterministic_us", ("mean_field", "walsh_hadamard", "walsh_hadamard_each")),
])  # fmt: skip
def test_quick(name, floor, sides):
    said = []
    report = benchmark_named(name).run(Options(quick=True, peers=(), say=said.append))
    assert len(said) == len(report.rows) >= 1
    for row in report.rows:
        assert row["benchmark"] == name
        assert row[floor] > 0
        assert all(row[side] > 0 for side in sides)
    assert report.table().row_count == len(report.rows)
    assert not report.failed


@pytest.mark.parametrize("size", [32, 256, 2048])
@pytest.mark.parametrize("largest", [4, 7])
def test_the_known_ways_are_the_transform(size, largest):
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_kronecker(size, largest)(x), hadamard(x), rtol=1e-4, atol=1e-5)
