"""The arc length as an objective: reference values, weights of draws, optima, the scale of an unnormalised target."""

import math

import pytest
import torch

from vifamily.models import Density
from vifamily.objectives import RocArc
from vifamily.testing._tools import flat_gradient

ROOT_2 = math.sqrt(2)


def log_normal(z, mean, sd):
    return -0.5 * ((z - mean) / sd) ** 2 - math.log(sd) - 0.5 * math.log(2 * math.pi)


def mixture(parts, log_evidence=0.0):
    """A mixture of normal laws, (weight, mean, sd) each."""

    def log_prob(z):
        each = torch.stack([math.log(w) + log_normal(z[:, 0], m, s) for w, m, s in parts])
        return torch.logsumexp(each, 0) + log_evidence

    return Density(log_prob, dim=1)


def normal(mean, sd, log_evidence=0.0):
    return mixture([(1.0, mean, sd)], log_evidence)


def student_3(log_evidence=0.0):
    law = torch.distributions.StudentT(torch.tensor(3.0, dtype=torch.float64), 0.0, 1.0)
    return Density(lambda z: law.log_prob(z[:, 0]) + log_evidence, dim=1)


# lengths of the optimal ROC curve of p against N(0, 1), by quadrature of sqrt(p^2 + q^2)
LENGTHS = [
    ((0.25, 1.0), 1.424977),
    ((0.5, 1.0), 1.454447030),
    ((1.0, 1.0), 1.546469337),
    ((2.0, 1.0), 1.749822958),
    ((3.0, 1.0), 1.891544675),
    ((0.0, 2.0), 1.51616653),
    ((0.0, 3.0), 1.60732009),
    ((1.0, 2.0), 1.55171929),
    ((1.0, 0.5), 1.64631074),
    ((2.0, 1.5), 1.67842306),
]


@pytest.mark.parametrize(("p", "length"), LENGTHS)
def test_lengths_of_pairs_of_normal_laws(p, length, tools):
    noise = torch.zeros(1, 0)
    for normalise, evidence in (("none", 0.0), (2.5, 2.5), ("self", 2.5), ("running", 2.5)):
        # the length is symmetric
        for family, model in (
            (tools.on_grid(0.0, 1.0), normal(*p, evidence)),
            (tools.on_grid(*p), normal(0.0, 1.0, evidence)),
        ):
            loss = RocArc(normalise, "enumerated").loss(family, model, noise)
            assert float(loss.value) + ROOT_2 == pytest.approx(length, abs=1e-6)
            assert float(loss.terms["arc_length"]) == pytest.approx(length, abs=1e-6)


def test_equal_laws_have_the_diagonal_and_separate_ones_two_edges(tools):
    noise = tools.quadrature_noise(1000)
    assert float(RocArc("none").loss(tools.gaussian(1.0, 1.4), normal(1.0, 1.4), noise).value) == pytest.approx(
        0, abs=1e-14
    )
    far = RocArc("none").loss(tools.gaussian(0.0, 1.0), normal(60.0, 1.0), noise)
    # the draws of q see its own edge alone; what is left of the other is the linear part, -(E[u] - 1) / sqrt 2
    assert float(far.value) == pytest.approx(1 - 1 / ROOT_2, abs=1e-12)


def gradient(objective, family, model, noise, state=None):
    return flat_gradient(objective.loss(family, model, noise, None, state), family)


def test_gradient_is_that_of_finite_differences(tools):
    # N(1, 1) against q = N(0.3, 1.4^2): derivatives in mean and sd by finite differences of the quadrature
    exact = torch.tensor([-0.110781, 0.050807], dtype=torch.float64)
    family = tools.gaussian(0.3, 1.4)
    mean, covariance = family.moments()
    wanted = torch.cat([
        g.reshape(-1)
        for g in torch.autograd.grad(
            exact[0] * mean.sum() + exact[1] * covariance.sqrt().sum(), [p for p in family.parameters() if p.numel()]
        )
    ])  # fmt: skip
    for name in ("reparameterised", "dreg"):
        found = gradient(RocArc("none", name), family, normal(1.0, 1.0), tools.quadrature_noise(40_000))
        assert torch.allclose(found, wanted, atol=5e-5)
    score, _ = tools.replicated_gradient(RocArc("none", "score"), normal(1.0, 1.0), family, 16, 5000)
    assert tools.same_mean(score, wanted.expand(2, -1))


def test_no_ratio_carries_more_than_the_bound(tools):
    # the path weight sin^2 cos is at most 2 / (3 sqrt 3), whatever the ratio
    from vifamily.numerics.f_generators import arc_length

    at = torch.linspace(-50, 50, 100_001, dtype=torch.float64)
    weight = arc_length().curvature(at)
    angle = torch.atan(at.exp())
    assert float(weight.max()) == pytest.approx(2 / (3 * math.sqrt(3)), abs=1e-6)
    assert torch.allclose(weight, angle.sin() ** 2 * angle.cos(), atol=1e-12)


# target, start, best normal law (mean, sd)
OPTIMA = {
    "two close modes": (mixture([(0.5, -2, 1), (0.5, 2, 1)]), (0.1, 2.0), (0.0, 2.258)),
    "two far modes of unequal weight": (mixture([(0.6, -3, 0.7), (0.4, 3, 0.7)]), (-0.5, 3.0), (-0.612, 3.020)),
    "heavy tails": (student_3(), (0.1, 1.2), (0.0, 1.255)),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_best_normal_law(name, tools):
    model, start, (mean, sd) = OPTIMA[name]
    noise = torch.zeros(1, 0)
    found = tools.minimum(RocArc("none", "enumerated"), model, tools.on_grid(*start), noise, 2)
    assert found[0] == pytest.approx(mean, abs=0.005) and found[1] == pytest.approx(sd, abs=0.005)


@pytest.mark.parametrize(("scale", "sd"), [(0.1, 1.605), (10.0, 1.201)])
def test_best_law_moves_with_the_evidence_unless_it_is_divided_out(scale, sd, tools):
    model, noise = student_3(math.log(scale)), torch.zeros(1, 0)
    raw = tools.minimum(RocArc("none", "enumerated"), model, tools.on_grid(0.0, 1.2), noise, 2)
    assert raw[1] == pytest.approx(sd, abs=0.005)
    for normalise in ("self", math.log(scale)):
        right = tools.minimum(RocArc(normalise, "enumerated"), model, tools.on_grid(0.0, 1.2), noise, 2)
        assert right[1] == pytest.approx(1.255, abs=0.005)


def test_the_running_scale_divides_the_evidence_out(tools):
    model, source = student_3(-30.0), torch.Generator().manual_seed(0)
    objective, family = RocArc(estimator="dreg"), tools.gaussian(0.4, 1.6)
    optimiser = torch.optim.Adam(family.parameters(), lr=0.02)
    state, kept = None, []
    for step in range(1500):
        optimiser.param_groups[0]["lr"] = 0.02 * 0.05 ** (step / 1500)
        optimiser.zero_grad()
        loss = objective.loss(family, model, torch.randn(32, 1, generator=source, dtype=torch.float64), None, state)
        loss.surrogate.backward()
        optimiser.step()
        state = loss.state
        if step > 1000:
            kept.append(float(family.moments()[1].detach().sqrt()))
    assert sum(kept) / len(kept) == pytest.approx(1.255, abs=0.05)
    assert float(state) == pytest.approx(-30, abs=0.2)
