"""The timings of the transform and of layers made of it, in their short mode."""

import pytest

from vifamily.benchmark import Options, benchmark_named


@pytest.mark.parametrize(("name", "floor", "sides"), [
    ("hadamard", "copy_us", ("torch", "dense_h", "dense_w", "rfft")),
    ("whvi", "linear_us", ("sampled", "local", "shared", "per_example")),
])  # fmt: skip
def test_quick(name, floor, sides):
    said = []
    report = benchmark_named(name).run(Options(quick=True, say=said.append))
    assert len(said) == len(report.rows) >= 1
    for row in report.rows:
        assert row["benchmark"] == name
        assert row[floor] > 0
        assert all(row[side] > 0 for side in sides)
    assert report.table().row_count == len(report.rows)
    assert not report.failed
