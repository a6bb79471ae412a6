"""The timing of ensembles of adapters, in its short mode."""

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from vifamily.benchmark import Options, benchmark_named  # noqa: E402
from vifamily.benchmark.llm import LARGE, SMALL  # noqa: E402

# PEFT asks transformers for a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def test_quick():
    said = []
    report = benchmark_named("llm").run(Options(quick=True, say=said.append))
    small, large = report.rows
    assert len(said) == 2 and report.table().row_count == 2
    assert small["rows_at_once"] == SMALL.rows and large["rows_at_once"] == LARGE.rows // 2
    for row in report.rows:
        assert row["step_ms"]["median"] > 0
        # K steps of single adapters, with room for a busy machine: a loop over members that adds passes is outside
        assert 0.1 < row["ratio"]["median"] < 1.5
    # the rows at once, their activations above all: 16 rows of 64 tokens of width 256 in 4 layers, in single precision
    assert small["peak_mb"] is None
    assert 60 < large["peak_mb"] < 120
