"""Steps translated to C give the numbers of torch, operation by operation."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from vifamily.numerics.native import _library, compile_loop
from vifamily.rng import scoped

DOUBLE = torch.float64
SOURCE = torch.Generator().manual_seed(0)
A = torch.randn(4, 6, generator=SOURCE, dtype=DOUBLE)
SQUARE = A @ A.T + 4 * torch.eye(4, dtype=DOUBLE)
INDEX = torch.tensor([[3, 0], [1, 3]])

# every group is one compilation; each function takes a (4, 6) matrix of normal numbers
GROUPS = {
    "elementwise": [
        lambda x: x.exp().log1p() + x.sigmoid() * x.tanh() - x.abs().sqrt(),
        lambda x: torch.nn.functional.softplus(3 * x) + torch.nn.functional.elu(x) + x.relu(),
        lambda x: torch.where(x > 0, x**2, x**3) + x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.abs().pow(0.5),
        lambda x: torch.maximum(x, -x) + torch.minimum(x, 2 * x.flip(1)) + x.erf() + (x.abs() + 0.1).reciprocal(),
        lambda x: (x.abs() + 0.1).lgamma() + (4 * x).digamma() + x.expm1() + x.sin() * x.cos() + 1 / (x.abs() + 1),
        lambda x: (x > 0.3).to(DOUBLE) + (x == x).to(DOUBLE) + x.round() + torch.remainder(x, 0.7) + 2 ** (-x),
        lambda x: torch.nn.functional.gelu(x) + torch.nn.functional.logsigmoid(x) + x.sign() + (x > 0).logical_not(),
        lambda x: x.float().double() + x.to(torch.int64) + x.atan() + torch.atan2(x, x.abs() + 1) + (x != 0),
    ],
    "reductions": [
        lambda x: x.sum(), lambda x: x.sum(0), lambda x: x.mean(-1, keepdim=True), lambda x: x.logsumexp(-1),
        lambda x: x.amax(0) + x.amin(0), lambda x: x.softmax(-1), lambda x: x.log_softmax(0),
        lambda x: x.cumsum(1), lambda x: (x > 3).any().to(DOUBLE) + (x < 9).all(), lambda x: x.prod(1),
        lambda x: x.norm(dim=1),
    ],
    "shapes": [
        lambda x: x.T.reshape(3, 8), lambda x: x[1:, ::2], lambda x: x[:, 3], lambda x: x.unsqueeze(1) * x,
        lambda x: torch.cat([x, 2 * x[:, :1]], 1), lambda x: torch.stack([x[0], x[1]], 1), lambda x: x.flip(0),
        lambda x: x.repeat(2, 1), lambda x: torch.nn.functional.pad(x, (1, -2, 0, 3)), lambda x: x[:4, :4].diagonal(),
        lambda x: torch.cat(x.split([2, 4], 1)[::-1], 1), lambda x: x[0].unbind(0)[2], lambda x: x.movedim(0, 1),
        lambda x: x.tril() + x.triu(1), lambda x: torch.diag_embed(x), lambda x: x[:, :0].sum(1),
    ],
    "indices": [
        lambda x: x[INDEX], lambda x: x[:, INDEX], lambda x: x[INDEX, INDEX], lambda x: x[INDEX, :, None][0],
        lambda x: x.gather(0, INDEX), lambda x: x.index_select(1, INDEX[0]), lambda x: x[-1] + x[[0, -1]].sum(0),
        lambda x: torch.zeros(4, 6, dtype=DOUBLE).scatter_add(0, INDEX, x[:2, :2]),
        lambda x: torch.zeros(4, 6, dtype=DOUBLE).index_put((INDEX,), x[:2].unsqueeze(1), accumulate=True),
    ],
    "products": [
        lambda x: x @ A.T, lambda x: A.T @ x, lambda x: A @ x[0], lambda x: x[0] @ x[1], lambda x: x[:1] @ A.T,
        lambda x: torch.einsum("ij,kj->ik", x, A), lambda x: torch.bmm(x.unsqueeze(1), x.unsqueeze(2)),
        lambda x: torch.addmm(SQUARE, x, A.T), lambda x: torch.nn.functional.linear(x, A, SQUARE[0]),
        lambda x: torch.linalg.solve_triangular(SQUARE.tril(), x, upper=False),
        lambda x: torch.linalg.solve_triangular((x @ x.T).triu() + 9 * torch.eye(4), A, upper=True),
        lambda x: torch.linalg.solve_triangular(SQUARE.triu(), A.T.contiguous() + x.T, upper=True, left=False),
        lambda x: torch.linalg.solve_triangular(SQUARE.tril().expand(2, 4, 4), torch.stack([x, A]), upper=False),
        lambda x: torch.linalg.cholesky(x @ x.T + SQUARE),
    ],
}  # fmt: skip


def in_place(x):
    out = torch.zeros_like(x)
    out[1:] = x[1:] * 2
    out.add_(1.0)
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIFAMILY_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", GROUPS)
def test_operations(name):
    functions = GROUPS[name] + ([in_place] if name == "shapes" else [])
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    state = torch.zeros(1, dtype=DOUBLE)
    loop = compile_loop(lambda s, x: ((s + 1,), [f(x).double() for f in functions]), carried=[state], sliced=[x[0]])
    assert not isinstance(loop, str), loop
    taken, outputs, _ = loop([state], [x], count=3)
    assert taken == 3
    for number, (function, got) in enumerate(zip(functions, outputs, strict=True)):
        expected = torch.stack([function(one).double() for one in x])
        assert got.shape == expected.shape, number
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-11), (number, (got - expected).abs().max())


def test_gradients():
    def value(x):
        joint = x[0].exp() * x[1].sin() + torch.nn.functional.softplus(x[2] * x[3])
        return joint.sum() + torch.linalg.cholesky(x @ x.T + SQUARE).diagonal().log().sum() + x[:, INDEX].square().sum()

    def gradient(x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(value(leaf), leaf)[0]

    x = A.clone()
    loop = compile_loop(lambda s: ((s - 0.01 * gradient(s),), ()), carried=[x], sliced=[])
    assert not isinstance(loop, str), loop
    expected = A.clone()
    for _ in range(20):
        expected = expected - 0.01 * gradient(expected)
    loop([x], [], count=20)
    assert torch.allclose(x, expected, rtol=1e-10, atol=1e-12)


def test_it_stops_before_the_first_number_that_is_not_finite():
    x = torch.tensor([3.0, 5.0], dtype=DOUBLE)
    loop = compile_loop(lambda x: ((x - 1,), (x.log(),)), carried=[x], sliced=[])
    taken, (logs,), _ = loop([x], [], count=10)
    assert taken == 3
    assert x.tolist() == [0.0, 2.0]
    assert torch.isfinite(logs[:taken]).all()


def test_what_is_watched_and_what_stays_may_change_between_calls():
    x, rate = torch.zeros(2, dtype=DOUBLE), torch.tensor([1.0], dtype=DOUBLE)
    loop = compile_loop(lambda x, r: ((x + r,), ()), carried=[x], sliced=[], fixed=[rate], watch=lambda x: (10 * x,))
    _, _, (rows,) = loop([x], [], count=7, phase=3, every=5)
    assert rows[:, 0].tolist() == [20.0, 70.0]
    rate.fill_(2.0)
    loop([x], [], count=1)
    assert x.tolist() == [9.0, 9.0]


@pytest.mark.parametrize(
    ("step", "said"),
    [(lambda x: ((x.half().double(),), ()), "numbers of type"), (lambda x: ((x[:1],), ()), "shape or type"),
     (lambda x: ((torch.linalg.eigvalsh(x.outer(x)),), ()), "eigh"),
     (lambda x: ((x[x > 0],), ()), "an index by a mask"),
     (lambda x: 1 / 0, "division by zero"), (lambda x: ((x + torch.rand_like(x),), ()), "random numbers")],
)  # fmt: skip
def test_what_cannot_be_compiled_is_said(step, said):
    with scoped(0):
        out = compile_loop(step, carried=[torch.ones(2, dtype=DOUBLE)], sliced=[])
    assert isinstance(out, str)
    assert re.search(said, out), out


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are a thing of POSIX")
def test_a_compiler_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    # as gcc does: a driver that waits for a process of its own
    driver = tmp_path / "driver"
    driver.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path / 'child'}\nwait\n")
    driver.chmod(0o755)
    with pytest.raises(_library.NoCompilerError, match="took more than 1 seconds"):
        _library._finished([str(driver)], seconds=1.0)
    child = int((tmp_path / "child").read_text())
    for _ in range(50):  # it is the init process that takes away what is left of an orphan
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_what_a_compiler_says_of_errors_is_kept():
    code, message = _library._finished([sys.executable, "-c", "import sys; sys.exit('no such header')"])
    assert code == 1 and "no such header" in message
