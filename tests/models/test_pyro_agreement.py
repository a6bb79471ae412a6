"""The log joint of Pyro programs is Pyro's own: by conditioning and tracing, one draw at a time."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.indexing import Vindex
from torch.distributions import biject_to

from vifamily.models import PyroModel
from vifamily.rng import scoped

DOUBLE = torch.float64
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=DOUBLE)
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=DOUBLE)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# --- programs ---


def eight_schools_centred(effect, error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=effect)


def eight_schools_non_centred(effect, error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)) as i:
        theta = pyro.sample("eta", dist.Normal(0.0, 1.0)) * tau + mu
        pyro.sample("y", dist.Normal(theta, error[i]), obs=effect[i])


def hierarchical_regression(x, group, y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    with pyro.plate("groups", 3):
        beta = pyro.sample("beta", dist.Normal(mu, sd).to_event(1))
    sigma = pyro.sample("sigma", dist.Exponential(1.0))
    with pyro.plate("data", len(y)) as i:
        mean = (beta[..., group[i], :] * x[i]).sum(-1)
        pyro.sample("y", dist.Normal(mean, sigma), obs=y[i])


def regression_for_one_draw(x, group, y):
    """Indexing without an ellipsis and a matrix product that know of no further axis."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)) as i:
        pyro.sample("y", dist.Normal(x[i] @ w + a[group[i]], 1.0), obs=y[i])


def control_flow(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    scale = 1.0 if float(x) > 0 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x, scale), obs=y)


def dirichlet_counts(counts):
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0, 0.5])))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), p), obs=counts)


def correlated(y):
    sd = pyro.sample("sd", dist.HalfCauchy(torch.ones(3)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    with pyro.plate("data", len(y)):
        scale = sd.unsqueeze(-1) * factor
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale), obs=y)


def gaussian_mixture(y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)) as i:
        k = pyro.sample("k", dist.Categorical(weight))
        pyro.sample("y", dist.Normal(Vindex(loc)[..., k], Vindex(scale)[..., k]), obs=y[i])


def gaussian_mixture_batched(y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(y)) as i:
        k = pyro.sample("k", dist.Categorical(weight))
        pyro.sample("y", dist.Normal(Vindex(loc)[..., k], 1.0), obs=y[i])


def gaussian_mixture_for_one_draw(y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(weight))
        pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y)


def switch_over_all_data(y):
    """One discrete latent above the plate of the data."""
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    s = pyro.sample("s", dist.Bernoulli(p))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu + 2 * s, 1.0), obs=y)


def hidden_markov(y):
    stay = pyro.sample("stay", dist.Beta(5.0, 2.0))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
    state = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        p = torch.where(state == 1, stay, 1 - stay)
        state = pyro.sample(f"state_{t}", dist.Bernoulli(p))
        mean = torch.where(state == 1, loc[..., 1], loc[..., 0])
        pyro.sample(f"y_{t}", dist.Normal(mean, 0.7), obs=y[t])


def logistic(x, y, size=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(y), subsample_size=size) as i:
        pyro.sample("y", dist.Bernoulli(logits=(w.unsqueeze(-2) * x[i]).sum(-1)), obs=y[i])


def ordered_cut_points(y):
    cut = pyro.sample(
        "cut",
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
        ),
    )
    eta = pyro.sample("eta", dist.StudentT(3.0, 0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.OrderedLogistic(eta, cut), obs=y)


def nested_plates(y):
    """Latents on two plates at once, a factor, and a scale put on by hand."""
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, tau))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with rows, columns:
        with poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)
        c = pyro.sample("c", dist.Uniform(-1.0, 2.0))
        pyro.factor("penalty", -(c**2))


def looped_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(y)):
        pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=y[i])


def covariance(y):
    """A symmetric matrix, a bounded number, and a masked observation."""
    r = pyro.sample("r", dist.LKJCholesky(2, 1.5))
    rho = pyro.sample("rho", dist.Uniform(-1.0, 1.0))
    t = pyro.sample("t", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform()]))
    with pyro.plate("data", len(y)), poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("y", dist.MultivariateNormal(rho * torch.ones(2), scale_tril=t * r), obs=y)


GROUP = torch.tensor([0, 1, 2, 0, 1, 2, 0])
X, Y = normal(7, 2), normal(7, seed=1)
PROGRAMS = {
    "eight_schools_centred": (eight_schools_centred, (EFFECT, ERROR), "batched"),
    "eight_schools_non_centred": (eight_schools_non_centred, (EFFECT, ERROR), "batched"),
    "hierarchical_regression": (hierarchical_regression, (X, GROUP, Y), None),
    "regression_for_one_draw": (regression_for_one_draw, (X, GROUP, Y), "vmap"),
    "control_flow": (control_flow, (Y,), "loop"),
    "dirichlet_counts": (dirichlet_counts, (torch.tensor([3.0, 1.0, 4.0, 2.0], dtype=DOUBLE),), "batched"),
    "correlated": (correlated, (normal(5, 3),), None),
    "gaussian_mixture": (gaussian_mixture, (Y,), "vmap"),
    "gaussian_mixture_for_one_draw": (gaussian_mixture_for_one_draw, (Y,), "vmap"),
    "switch_over_all_data": (switch_over_all_data, (Y,), "batched"),
    "gaussian_mixture_batched": (gaussian_mixture_batched, (Y,), "batched"),
    "hidden_markov": (hidden_markov, (Y[:5],), None),
    "logistic": (logistic, (X, (Y > 0).double()), None),
    "ordered_cut_points": (ordered_cut_points, (torch.tensor([0, 1, 2, 3, 1]),), None),
    "nested_plates": (nested_plates, (normal(3, 4),), "batched"),
    "looped_plate": (looped_plate, (Y,), "batched"),
    "covariance": (covariance, (normal(3, 2),), None),
}


def pyro_log_joint(program, args, model, z):
    """Pyro's log joint at one point of unconstrained space, with the Jacobians of torch's transforms."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DOUBLE)
    try:
        with scoped(0):
            prior = poutine.trace(program).get_trace(*args)
        theta, log_jacobian, start = {}, 0.0, 0
        for site in model.layout:
            transform = biject_to(prior.nodes[site.name]["fn"].support)
            x = z[start : start + site.size].reshape(site.unconstrained_shape)
            theta[site.name] = transform(x)
            log_jacobian = log_jacobian + transform.log_abs_det_jacobian(x, theta[site.name]).sum()
            start += site.size
        discrete = [n for n, s in prior.nodes.items() if s["type"] == "sample" and not s["is_observed"]
                    and n not in theta and type(s["fn"]).__name__ != "_Subsample"]  # fmt: skip
        conditioned = poutine.condition(program, data=theta)
        if not discrete:
            return poutine.trace(conditioned).get_trace(*args).log_prob_sum() + log_jacobian
        nesting = 2
        enumerated = poutine.enum(config_enumerate(conditioned), first_available_dim=-1 - nesting)
        trace = poutine.trace(enumerated).get_trace(*args)
        evaluator = TraceEinsumEvaluator(trace, has_enumerable_sites=True, max_plate_nesting=nesting)
        return evaluator.log_prob(trace) + log_jacobian
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_log_joint_is_that_of_pyro(name):
    program, args, mode = PROGRAMS[name]
    model = PyroModel(program, *args)
    z = 0.8 * normal(6, model.dim, seed=3)
    got = model.log_joint(z)
    expected = torch.stack([pyro_log_joint(program, args, model, one) for one in z])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert mode is None or model.program.mode == mode, model.notes
    # any leading axes, and one draw alone
    torch.testing.assert_close(model.log_joint(z.reshape(2, 3, -1)), got.reshape(2, 3), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.log_joint(z[0]), got[0], rtol=1e-10, atol=1e-10)
