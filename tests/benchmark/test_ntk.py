"""The timing of the tangent kernel, in its short mode."""

from vifamily.benchmark import Options, benchmark_named
from vifamily.benchmark.ntk import _network


def test_quick():
    report = benchmark_named("ntk").run(Options(quick=True, say=lambda line: None))
    assert {row["side"] for row in report.rows} == {"layerwise_gram", "ntk_product", "jacobian_gram"}
    assert all(row["seconds"]["median"] > 0 for row in report.rows)
    assert report.table().row_count == 3
    assert not report.failed


def test_the_large_network_has_over_a_million_parameters():
    assert sum(p.numel() for p in _network(704).parameters()) > 1_000_000
