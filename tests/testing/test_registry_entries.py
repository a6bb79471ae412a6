"""Every registered entry keeps the contracts of its kind, at its defaults and with other options."""

import pytest

from vifamily import registry, testing
from vifamily.testing import targets

OBJECTIVES = [
    "elbo(estimator=score)",
    "elbo(estimator=entropy)",
    "iwae(estimator=reparameterised)",
    "renyi(alpha=0.2)",
    "renyi(alpha=1)",
    "renyi(alpha=2)",
    "renyi(alpha=-1)",
    "f_divergence(kind=kl_reverse)",
    "f_divergence(kind=amari_alpha, alpha=0.7, normalise=self)",
    "roc_arc(normalise=self)",
    "perturbative(order=1)",
    "thermodynamic(partitions=1)",
    "thermodynamic(partitions=3, estimator=covariance)",
    "annealed(of=roc_arc, part=likelihood)",
    "tempered(temperature=3)",
    "fisher(weight=covariance)",
    "ksd(bandwidth=1.0)",
    "renyi_predictive(alpha=0)",
    "renyi_predictive(alpha=2, estimator=reparameterised)",
    "bb_alpha(alpha=1, form=simplified)",
    "cubo(n=1.5)",
]
FAMILIES = [
    "mean_field(student_t=4)",
    "full_rank(student_t=5)",
    "low_rank(rank=1, student_t=6)",
    "mixture(components=2, of=full_rank)",
    "flow(kind=maf, hidden=[8])",
    "flow(kind=nice, hidden=[8])",
    "flow(kind=bpf, hidden=[8], transforms=1)",
    "flow(kind=planar)",
    "ensemble(size=4, jitter=0.3)",
    "categorical(max_states=0)",
]
# at an infinite order the bound is no smooth function of q where log ratios tie, as they all do at q = p
# (and likewise where a divergence has a kink at ratios of one)
TIES = {"zero_at_posterior": "all log ratios tie at q = p"}


@pytest.mark.parametrize("name", registry.names("objectives"))
def test_objectives_at_their_defaults(name):
    assert len(testing.check_objective(name).passed) >= 12


@pytest.mark.parametrize("spec", OBJECTIVES)
def test_objectives_with_options(spec):
    assert "gradient" in testing.check_objective(spec).passed


@pytest.mark.parametrize("spec", ["svgd(kernel=imq)", "svgd(kernel=linear)", "svgd(bandwidth=1.0, cycles=2)"])
def test_particle_objectives_with_options(spec):
    assert "kl_descent" in testing.check_objective(spec).passed


@pytest.mark.parametrize("alpha", ["inf", "-inf"])
def test_objectives_of_infinite_order(alpha):
    assert "gradient" in testing.check_objective(f"renyi(alpha={alpha})", skip=TIES).passed


def test_objectives_with_a_kink():
    spec = "f_divergence(kind=total_variation)"
    assert "gradient" in testing.check_objective(spec, skip=TIES).passed


def test_objectives_that_take_the_joint_as_normalised():
    report = testing.check_objective("f_divergence(kind=jeffreys, normalise=none)")
    assert "misspecified" in report.passed and "declares" in report.skipped["constant_invariance"]


@pytest.mark.parametrize("name", registry.names("families"))
def test_families_at_their_defaults(name):
    assert len(testing.check_family(name).passed) >= 12


@pytest.mark.parametrize("spec", FAMILIES)
def test_families_with_options(spec):
    assert len(testing.check_family(spec).passed) >= 14


@pytest.mark.parametrize("name", registry.names("solvers"))
def test_solvers_at_their_defaults(name):
    assert testing.check_solver(name).passed == ("reports", "converges", "restarts", "resumes", "non_finite")


@pytest.mark.parametrize(
    "model",
    [
        targets.linear_regression().model,
        targets.correlated_normal().model,
        targets.two_normals().model,
        targets.discrete().model,
        targets.local_normal().model,
        "banana",
        "diabetes",
        "eight_schools",
        "poisson_glm",
        "student_t_regression",
    ],
    ids=str,
)
def test_models(model):
    assert "draws_apart" in testing.check_model(model).passed


def test_the_whole_registry_is_covered():
    reports = testing.check_registry(["models"])
    assert set(reports) == {f"models/{name}" for name in registry.names("models")}
    assert all("check_model" in report.skipped["all"] for report in reports.values())
