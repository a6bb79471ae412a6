"""The discrete Stein divergence: its closed forms against tables found by brute force, and where it ends."""

import pytest
import torch

import vifamily as vf
from vifamily.errors import ConfigError, IncompatibleError, NonFiniteLossError
from vifamily.models import Density
from vifamily.objectives import DiscreteStein

DOUBLE = torch.float64
P = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=DOUBLE)
Q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE)


def states(p, *shape):
    names = {f"k{i}": ((), f"integer_interval(0, {n - 1})") for i, n in enumerate(shape)}
    table = p.log().reshape(shape)
    return Density(lambda t: table[tuple(t[name].long() for name in names)], parameters=names)


def value(q, p, **options):
    model = states(p, len(p))
    family = vf.registry.build("families", "categorical").build(
        vf.types.LatentSpec(1, model.space, model.num_categories), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        family.logits.copy_(q.log())
    return float(DiscreteStein(**options).loss(family, model, torch.zeros(1, 0, dtype=DOUBLE)).value)


def mean_of_operator(f, q, p):
    """From its definition, state by state."""
    total = torch.zeros((), dtype=DOUBLE)
    for z in range(len(p)):
        ahead = f[z + 1] * p[z + 1] if z + 1 < len(p) else 0.0
        total = total + q[z] * (ahead - f[z] * p[z]) / p[z]
    return total


def test_the_operator_has_mean_zero_under_the_target():
    f = torch.tensor([0.0, 1.3, -0.4, 2.2], dtype=DOUBLE)
    assert float(mean_of_operator(f, P, P)) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_the_penalised_form_is_the_best_table_found_by_ascent(tau):
    f = torch.zeros(4, dtype=DOUBLE, requires_grad=True)
    optimiser = torch.optim.LBFGS([f], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def minus_value():
        optimiser.zero_grad()
        held = torch.cat([torch.zeros(1, dtype=DOUBLE), f[1:]])
        out = -(mean_of_operator(held, Q, P) - tau * (Q * held.square()).sum())
        out.backward()
        return out

    optimiser.step(minus_value)
    assert -4 * tau * float(minus_value().detach()) == pytest.approx(value(Q, P), rel=1e-8)


def test_the_squared_form_is_the_best_table_of_signs():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DOUBLE)] * 3)
    tables = torch.cat([torch.zeros(8, 1, dtype=DOUBLE), signs], dim=1)
    best = max(float(mean_of_operator(f, Q, P)) ** 2 for f in tables)
    assert value(Q, P, distance="square") == pytest.approx(best, rel=1e-12)


def test_it_needs_no_evidence():
    assert value(Q, 37.0 * P) == pytest.approx(value(Q, P), rel=1e-12)


def test_independent_coordinates_are_found():
    p = torch.outer(P, torch.tensor([0.7, 0.3], dtype=DOUBLE))
    posterior = vf.fit(states(p.reshape(-1), 4, 2), "categorical", "discrete_stein", seed=0)
    found = posterior.family.log_probabilities().exp()
    assert torch.allclose(found[0], P, atol=1e-3)
    assert torch.allclose(found[1, :2], torch.tensor([0.7, 0.3], dtype=DOUBLE), atol=1e-3)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="'penalised' or 'square'"):
        DiscreteStein(distance="cube")
    with pytest.raises(IncompatibleError, match="weights that carry the gradient"):
        vf.plan(states(P, 4), "categorical(max_states=0)", "discrete_stein")
    with pytest.raises(IncompatibleError):
        vf.plan("banana", "full_rank", "discrete_stein")
    impossible = torch.tensor([0.5, 0.0, 0.5], dtype=DOUBLE)
    with pytest.raises(NonFiniteLossError):
        vf.fit(states(impossible, 3), "categorical", "discrete_stein", "adam", steps=5, seed=0)
