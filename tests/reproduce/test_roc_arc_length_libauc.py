"""LibAUC on the imbalanced tasks: what is sent, what is read, and what is said where it is not installed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vifamily.benchmark import _environments as environments
from vifamily.benchmark.peers import libauc_aucm
from vifamily.cli import app
from vifamily.errors import BenchmarkError
from vifamily.reproduce import Options
from vifamily.reproduce import _roc_arc_length_libauc as beside
from vifamily.reproduce import roc_arc_length as paper
from vifamily.reproduce._roc_arc_length_imbalance import TASKS, prepare
from vifamily.rng import scoped

# ranks by the first feature, with the network that it was sent as a check of its shape
WORKER = """
import json, sys
from pathlib import Path
import numpy as np
place = Path(sys.argv[1]).parent
job, data = json.loads((place / "job.json").read_text()), np.load(place / "data.npz", allow_pickle=False)
scores = {}
for i, seed in enumerate(job["seeds"]):
    assert [data[f"{i}/weight{k}"].shape[0] for k in range(3)] == [32, 32, 1]
    for name in ("test_pos", "test_neg"):
        scores[f"{i}/{name}"] = data[f"{i}/{name}"][:, 0].copy()
#HERE
np.savez(place / "answer.npz", **scores)
(place / "answer.json").write_text("{}")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a worker in the place of LibAUC's."""

    def put(change=""):
        script = tmp_path / "worker.py"
        script.write_text(WORKER.replace("#HERE", change), "utf-8")
        monkeypatch.setattr(beside, "AUC_PEERS", {"libauc": environments.Peer(str(script), None)})
        monkeypatch.setattr(beside, "interpreter", lambda name, folder: Path(sys.executable))
        monkeypatch.setattr(beside, "TASKS", {"breast cancer": TASKS["breast cancer"]})

    return put


def quiet(**options):
    return Options(say=lambda _: None, **options)


def test_rows_are_the_aucs_of_the_workers_scores(fake):
    fake()
    rows, missing = beside.libauc_rows((0.05, 0.1), (3, 4), quiet(), max_iter=5)
    assert missing == ""
    assert [(row["fraction"], row["seed"]) for row in rows] == [(0.05, 3), (0.05, 4), (0.1, 3), (0.1, 4)]
    split = TASKS["breast cancer"](0.05, 3)
    a, b = split.test_pos[:, 0], split.test_neg[:, 0]
    by_hand = np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b))  # scaling a feature keeps its order
    assert rows[0]["auc"] == pytest.approx(by_hand, abs=1e-10)
    assert {row["method"] for row in rows} == {"LibAUC"}


def test_it_is_said_where_it_is_not_installed(tmp_path):
    rows, missing = beside.libauc_rows((0.1,), (0,), quiet(peers_dir=tmp_path), max_iter=5)
    assert rows == []
    claim = paper._beside_libauc([], "a setting", missing)
    assert claim.holds is None
    assert "not installed" in claim.reason and "--install-peers" in claim.reason


HOSTILE = {
    "fails": ("raise ValueError('no such loss')", "no such loss"),
    "missing": ("scores.pop('0/test_neg')", "0/test_neg"),
    "short": ("scores['0/test_pos'] = scores['0/test_pos'][:2]", "0/test_pos"),
    "not finite": ("scores['0/test_pos'][0] = np.nan", "finite"),
    "words": ("scores['0/test_pos'] = scores['0/test_pos'].astype(str)", "numbers"),
    "objects": ("scores['0/test_pos'] = scores['0/test_pos'].astype(object)", "cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_answers_that_cannot_be_used_are_reasons(name, fake):
    change, expected = HOSTILE[name]
    fake(change)
    rows, missing = beside.libauc_rows((0.1,), (0,), quiet(), max_iter=5)
    assert rows == []
    assert expected in missing


def test_an_answer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match="cannot be read"):
        beside.read_scores(tmp_path, sizes=[(1, 1)])


def test_the_claim_has_paired_differences():
    rows = [
        {"task": "a", "fraction": 0.1, "seed": seed, "method": method, "auc": auc + 0.01 * seed}
        for seed in (0, 1)
        for method, auc in (("LibAUC", 0.8), ("AUC margin", 0.85), ("two steps, tanh", 0.9))
    ]
    claim = paper._beside_libauc(rows, "a setting", "")
    assert claim.holds is None
    assert claim.measured == (
        "mean AUC 0.8050; AUC margin minus that: +0.0500 ± 0.0000; two steps, tanh minus that: +0.1000 ± 0.0000"
    )


def test_what_is_bare_is_named_with_what_it_imports():
    peer = environments.AUC_PEERS["libauc"]
    assert peer.bare == ("libauc==2.0.1",)
    assert not {*environments.AUC_PEERS} & {*environments.PEERS, *environments.LAYER_PEERS, *environments.NPE_PEERS}


# -- the worker, with an optimiser and a loss of its own ---------------------------------------------------------------
class Margin(torch.nn.Module):
    """The AUC-margin loss with its inner problems solved, in the place of LibAUC's."""

    def __init__(self, version, device):
        super().__init__()

    def forward(self, scores, target):
        pos, neg = scores[target == 1], scores[target == 0]
        return pos.var(correction=0) + neg.var(correction=0) + (1 + neg.mean() - pos.mean()).clamp_min(0).square()


class Descent(torch.optim.SGD):
    """Gradient descent with the calls that the worker makes."""

    falls = 0

    def __init__(self, params, loss_fn, device, verbose):
        super().__init__(params, lr=0.5)

    def update_regularizer(self, decay_factor):
        type(self).falls += 1


def test_the_worker_starts_where_it_is_told_and_learns(tmp_path, monkeypatch):
    case = prepare(TASKS["breast cancer"](0.1, 0), 0)
    arrays = beside._arrays(case)
    with scoped(0):
        module = libauc_aucm._network(torch, arrays)
    hidden = torch.tanh(case.tests[0] @ case.start["weights.0"].mT + case.start["biases.0"])
    assert torch.allclose(module[:2](case.tests[0].float()).double(), hidden, atol=1e-5)
    np.savez(tmp_path / "data.npz", **{f"0/{name}": value for name, value in arrays.items()})
    job = {"seeds": [0], "max_iter": 60, "batch_size": 32, "version": "v1"}
    (tmp_path / "job.json").write_text(json.dumps(job), "utf-8")
    losses, optimizers = SimpleNamespace(AUCMLoss=Margin), SimpleNamespace(PESG=Descent)
    monkeypatch.setitem(sys.modules, "libauc", SimpleNamespace(losses=losses, optimizers=optimizers))
    monkeypatch.setattr(libauc_aucm.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(Descent, "falls", 0)
    before = torch.get_num_threads()
    with scoped(0):
        libauc_aucm.main(str(tmp_path / "job.json"))
    torch.set_num_threads(before)
    assert Descent.falls == 2
    ((g_pos, g_neg),) = beside.read_scores(tmp_path, sizes=[tuple(len(x) for x in case.tests)])
    assert beside.auc_of(g_pos, g_neg) > 0.9


def test_batches_hold_whole_passes_and_repeat_the_rare():
    source = np.random.default_rng(0)
    rows = libauc_aucm._rows(3, 6, source)
    assert [sorted(next(rows)) for _ in range(2)] == [[0, 0, 1, 1, 2, 2]] * 2
    rows = libauc_aucm._rows(5, 2, source)
    assert sorted(np.concatenate([next(rows) for _ in range(5)])) == sorted([*range(5), *range(5)])


def test_options_reach_the_paper(tmp_path, monkeypatch):
    got = []

    def run(options):
        got.append(options)
        return paper.Reproduction([paper.Claim("nothing", None, None, None, None, "a test")])

    monkeypatch.setattr(paper, "PAPER", paper.Paper("a title", "a source", run))
    done = CliRunner().invoke(app, ["reproduce", "roc-arc-length", "--peers-dir", str(tmp_path), "--install-peers"])
    assert done.exit_code == 0, done.output
    assert (got[0].peers_dir, got[0].install_peers) == (tmp_path, True)
