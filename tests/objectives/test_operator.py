"""Operator variational inference: what the operators compute, what the game's optimum is, where it ends."""

import dataclasses
import math

import pytest
import torch

import vifamily as vf
from vifamily import testing
from vifamily.errors import ConfigError, IncompatibleError, NotAvailableError
from vifamily.families._stack import StackedFamily
from vifamily.models import Density
from vifamily.objectives import Elbo, Operator
from vifamily.objectives._critics import Critic, Perceptron
from vifamily.objectives._operators import LangevinStein, scores
from vifamily.testing import _games, targets
from vifamily.testing._report import Broken
from vifamily.testing._tools import flat_gradient, replicate
from vifamily.types import LatentSpec, Loss

DOUBLE = torch.float64


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=source(seed), dtype=DOUBLE)


def family_of(spec, dim, seed=0):
    out = vf.registry.build("families", spec).build(LatentSpec(dim), generator=source(seed))
    with torch.no_grad():
        for p in out.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=source(seed + 1), dtype=DOUBLE))
    return out


# --- operators ---


def test_kl_as_an_operator_is_the_loss_of_the_elbo_on_the_same_noise():
    target, family, noise = targets.linear_regression(), family_of("full_rank", 2), randn(6, 2)
    a = Operator(operator="kl").loss(family, target.model, noise)
    b = Elbo("reparameterised").loss(family, target.model, noise)
    assert torch.allclose(a.value, b.value, rtol=1e-12)
    assert torch.allclose(flat_gradient(a, family), flat_gradient(b, family), rtol=1e-10)
    assert vf.plan("banana", "full_rank", "operator(operator=kl)", "adam").objective.own_solver is None


NETS = {"one": (7,), "two": (6, 5), "three": (6, 5, 4), "linear": ()}


@pytest.mark.parametrize("max_norm", [None, 0.7])
@pytest.mark.parametrize("name", NETS)
def test_the_exact_divergence_is_the_trace_of_the_jacobian(name, max_norm):
    net = Perceptron(3, NETS[name], source(), dtype=DOUBLE, device=torch.device("cpu"), max_norm=max_norm)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(randn(*p.shape, seed=3))
    u = randn(5, 3, seed=1)
    field, trace = net.with_divergence(u, None)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda x: net.with_divergence(x[None], None)[0][0], u[i])
        assert torch.allclose(trace[i], jacobian.trace(), atol=1e-12)
    if max_norm is not None:
        assert all(float(w.detach().norm(dim=-1).max()) <= max_norm + 1e-12 for w in net._layers())


@pytest.mark.parametrize("name", ["two", "three"])
def test_the_estimated_trace_is_unbiased_and_exact_over_all_signs(name):
    net = Perceptron(3, NETS[name], source(), dtype=DOUBLE, device=torch.device("cpu"))
    with torch.no_grad():
        net.linear.copy_(randn(3, 3, seed=5))
    u = randn(4, 3, seed=1)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DOUBLE)] * 3).expand(4, 8, 3)
    assert torch.allclose(net.with_divergence(u, signs)[1], net.with_divergence(u, None)[1], atol=1e-12)


class Swirl(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.matrix = torch.nn.Parameter(randn(dim, dim, seed=4))

    def forward(self, u):
        return torch.sin(u @ self.matrix.T) + u.square()


def test_a_critic_of_ones_own_has_its_divergence_and_plays():
    state = Operator(critic=Swirl).init_state(targets.linear_regression().model, family_of("full_rank", 2),
                                              generator=source())  # fmt: skip
    u = randn(5, 2, seed=1)
    trace = state.critic(u)[1]
    own = Swirl(2)
    wanted = [torch.autograd.functional.jacobian(lambda x: own(x[None])[0], u[i]).trace() for i in range(5)]
    assert torch.allclose(trace.detach(), torch.stack(wanted).detach(), atol=1e-12)
    _games._players(Operator(critic=Swirl))
    members = [family_of("full_rank", 2, seed=r) for r in range(3)]
    stack, noise, model = StackedFamily(members), randn(3, 6, 2), targets.linear_regression().model
    whole = Operator(critic=Swirl)
    together = whole.loss(stack, model, noise, None, whole.init_state(model, stack, generator=source()))
    for r, member in enumerate(members):
        alone = whole.loss(member, model, noise[r], None, whole.init_state(model, member, generator=source()))
        assert torch.allclose(alone.value, together.value[r], rtol=1e-12)


def test_it_works_in_standardised_coordinates():
    """Another unit for a latent changes neither value nor the critic's gradient."""
    scale = torch.tensor([1e-3, 50.0], dtype=DOUBLE)
    plain = Density(lambda z: -0.25 * z.square().square().sum(-1), dim=2)
    scaled = Density(lambda z: -0.25 * (z / scale).square().square().sum(-1), dim=2)
    one, other = family_of("full_rank", 2), family_of("full_rank", 2)
    other.precondition(torch.zeros(2, dtype=DOUBLE), torch.diag(scale))
    values = []
    for family, model in ((one, plain), (other, scaled)):
        state = Operator().init_state(model, family, generator=source())
        loss = Operator().loss(family, model, randn(9, 2), None, state)
        values.append((loss.value, flat_gradient(loss, state.critic)))
    assert torch.allclose(values[0][0], values[1][0], rtol=1e-9)
    assert torch.allclose(values[0][1], values[1][1], rtol=1e-9)


# --- the game ---


class Unpenalised(Operator):
    """The penalty as a constant for the family: what is right where draws are data, and wrong here."""

    def loss(self, family, model, noise, batch=None, state=None):
        whole = super().loss(family, model, noise, batch, state)
        draw = family(noise)
        size = (draw.log_weight.exp() * state.critic(draw.z)[0].square().sum(-1)).sum(-1)
        held = state.critic(draw.z.detach())[0].square().sum(-1)
        frozen = (draw.log_weight.exp() * held).sum(-1)
        surrogate = whole.surrogate + self.tau * (size - frozen)
        return Loss(surrogate, whole.value, whole.terms, whole.state)


@pytest.mark.parametrize("contract", [_games._players, _games._envelope])
def test_the_kit_finds_a_penalty_that_is_not_differentiated(contract):
    with pytest.raises(Broken):
        contract(Unpenalised())


class WithoutDivergence(LangevinStein):
    """Its mean under the posterior is not zero."""

    name = "without_divergence"

    def values(self, draw, model, batch, critic, probes):
        field, _ = critic(draw.z, probes)
        return (critic.standard_score(scores(model, draw.z, batch)) * field).sum(-1), field.square().sum(-1)


class SaysItSees(LangevinStein):
    name = "says_it_sees"
    blind_to_mode_weights = False


class Forgetful(Operator):
    """Its state does not count evaluations, so that probes would be the same at each."""

    def loss(self, family, model, noise, batch=None, state=None):
        return dataclasses.replace(super().loss(family, model, noise, batch, state), state=state)


PLANTED = {
    "closeness": (_games._closeness, Operator(operator=WithoutDivergence())),
    "no gain": (_games._no_gain, Operator(operator=WithoutDivergence())),
    "mode weights": (_games._mode_weights, Operator(operator=SaysItSees())),
    "state": (_games._state, Forgetful()),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_kit_finds_what_is_wrong(name):
    contract, objective = PLANTED[name]
    with pytest.raises(Broken):
        contract(objective)


@pytest.mark.parametrize("spec", ["operator(operator=kl)", "operator(distance=square)"])
def test_other_forms_keep_their_contracts(spec):
    assert len(testing.check_objective(spec).passed) >= 12


def test_the_squared_form_has_the_gradient_of_the_squared_mean(tools):
    """Over many pairs of halves, against differences of the population's square, by a rule on a grid."""
    model = Density(lambda z: -0.5 * (z[:, 0] - 1.0) ** 2 - 0.1 * z[:, 0] ** 4, dim=1)
    objective = Operator(distance="square", hidden=(4,))
    family = tools.gaussian([0.3], [0.8])
    state = objective.init_state(model, family, generator=source())
    grid = tools.quadrature_noise(4000)

    def population():
        draw = family(grid)
        return float(LangevinStein().values(draw, model, None, state.critic, None)[0].mean()) ** 2

    wanted = []
    with torch.no_grad():
        for p in family.parameters():
            for i in range(p.numel()):
                sides = []
                for sign in (1, -1):
                    p.view(-1)[i] += sign * 1e-5
                    sides.append(population())
                    p.view(-1)[i] -= sign * 1e-5
                wanted.append((sides[0] - sides[1]) / 2e-5)
    stack = replicate(family, 4000)
    many = objective.init_state(model, stack, generator=source())
    noise = randn(4000, 8, 1, seed=9)
    rows = flat_gradient(objective.loss(stack, model, noise, None, many), stack, 4000)
    error = rows.std(0) / math.sqrt(len(rows))
    assert bool(((rows.mean(0) - torch.tensor(wanted, dtype=DOUBLE)).abs() < 5 * error).all())
    # one set of draws for both factors is off by the variance of the mean
    mean = LangevinStein().values(stack(noise), model, None, many.critic, None)[0].mean(-1)
    naive = flat_gradient(Loss(mean.square(), mean.detach()), stack, 4000)
    assert bool(((naive.mean(0) - torch.tensor(wanted, dtype=DOUBLE)).abs() > 5 * error).any())


# --- what it refuses ---

BAD = {
    "operator": ({"operator": "wasserstein"}, "operator must be one of langevin_stein, kl"),
    "distance": ({"distance": "cube"}, "distance must be one of"),
    "square kl": ({"operator": "kl", "distance": "square"}, "goes with distance='identity'"),
    "penalty": ({"penalty": 0.0}, "positive number"),
    "penalty of square": ({"distance": "square", "penalty": 1.0}, "leave it out"),
    "hidden": ({"hidden": [0]}, "list of positive integers"),
    "probes": ({"probes": 0}, "positive integer"),
    "trace": ({"trace": "guess"}, "trace must be one of"),
    "critic": ({"critic": torch.nn.Linear(2, 2)}, "a function from the number of coordinates"),
    "critic and hidden": ({"critic": Swirl, "hidden": [3]}, "leave them out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name):
    options, words = BAD[name]
    with pytest.raises(ConfigError, match=words):
        Operator(**options)


def test_combinations_that_cannot_work_are_refused():
    with pytest.raises(IncompatibleError, match="no draws that carry unequal weights"):
        vf.plan("banana", "mixture(components=2)", "operator(distance=square)")
    with pytest.raises(IncompatibleError, match="not a sum over data"):
        vf.plan("breast_cancer", "full_rank", "operator(distance=square)", batch_size=10)
    with pytest.raises(IncompatibleError, match="two_player"):
        vf.plan("banana", "full_rank", "operator", "adam")
    with pytest.raises(IncompatibleError, match="no critic"):
        vf.plan("banana", "full_rank", "elbo", "two_player")
    with pytest.raises(NotAvailableError, match="init_state"):
        Operator().loss(family_of("full_rank", 2), targets.linear_regression().model, randn(4, 2))
    with pytest.raises(ConfigError, match="from a number of coordinates to a module"):
        Critic(lambda dim: 3, 2, torch.zeros(2), torch.ones(2), full=False)


def test_an_operator_of_ones_own_is_played():
    class Tilted(LangevinStein):
        """Langevin-Stein with a test function of fixed weight, still of zero mean under the posterior."""

        name = "tilted"

        def values(self, draw, model, batch, critic, probes):
            each, size = super().values(draw, model, batch, critic, probes)
            return 2.0 * each, size

    posterior = vf.fit(
        "correlated_normal", "full_rank", Operator(operator=Tilted()), "two_player(audit=2)", steps=5, seed=0
    )
    assert posterior.record.steps == 5
