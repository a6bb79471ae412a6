"""Responsibilities and mixture scores, from log likelihoods and of posteriors; choosing alpha."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import plots
from vifamily.diagnostics import mixture_log_score, responsibilities
from vifamily.errors import ConfigError, DataError, NotAvailableError, ShapeError
from vifamily.models import LikelihoodModel
from vifamily.testing import targets

ENTROPY = 0.5 * math.log(2 * math.pi) + 0.5


def normal_data(size, variance=1.0, mean=0.0):
    y = torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size)
    return mean + y * (variance / y.square().mean()).sqrt()


def location(y, groups=None):
    return LikelihoodModel(
        (0.0, 20.0),
        lambda z, y: -0.5 * (y - z) ** 2 - 0.5 * math.log(2 * math.pi),
        data=y,
        dim=1,
        groups=groups,
    )


SPLIT = torch.cat([normal_data(150, mean=-5.0), normal_data(50, mean=5.0)])
LABELS = ["low"] * 150 + ["high"] * 50


@pytest.fixture(scope="module")
def split():
    """Two members on two groups of data, three to one."""
    return vf.fit(location(SPLIT), "ensemble(size=2)", "renyi_predictive(alpha=0.8)", seed=0)


# --- from log likelihoods ---
def test_figures_by_hand():
    a = torch.tensor([[0.0, -1.0, -30.0], [-2.0, -1.0, 0.0], [-60.0, -60.0, -60.0]], dtype=torch.float64)
    found = responsibilities(a, torch.tensor([0.5, 0.4, 0.1]).log(), 0.5, names=["a", "b", "c"])
    powers = torch.tensor([0.5, 0.4, 0.1]).double()[:, None] * torch.exp(0.5 * a)
    w = powers / powers.sum(0)
    assert torch.allclose(found.weight, w, atol=1e-7)
    assert torch.allclose(found.usage, w.mean(1), atol=1e-7) and found.dead == ("c",)
    entropy = -(w * w.log()).sum(0)
    assert found.routing_entropy == pytest.approx(float(entropy.mean()), abs=1e-6)
    usage = -(w.mean(1) * w.mean(1).log()).sum()
    assert found.effective_members == pytest.approx(math.exp(usage), rel=1e-6)
    assert found.route_information() == pytest.approx(float(usage - entropy.mean()), abs=1e-6)
    # with one label for all nothing is told; with a label for each unit as much as by the units themselves
    assert found.route_information(["x"] * 3) == pytest.approx(0.0, abs=1e-9)
    assert found.route_information(torch.arange(3)) == pytest.approx(found.route_information(), abs=1e-9)
    assert found.routed_nll[1].item() == pytest.approx(float(-(w[1] * a[1]).sum() / w[1].sum()), rel=1e-6)
    text = str(found)
    assert "c (dead)" in text and "3 units (datum) at alpha 0.5" in text
    assert found.to_dict()["dead"] == ["c"] and len(found.to_dict()["members"]) == 3


def test_members_that_are_all_but_equal_tell_nothing(generator):
    # a hard choice of the largest responsibility would read information into them
    a = torch.randn(1, 400, generator=generator).double() + 1e-6 * torch.randn(4, 400, generator=generator).double()
    found = responsibilities(a, torch.zeros(4), 1.0)
    assert found.route_information() < 1e-10 and found.routing_entropy == pytest.approx(math.log(4), abs=1e-6)
    hard = torch.nn.functional.one_hot(found.weight.argmax(0), 4).double()
    assert torch.special.entr(hard.mean(0)).sum() > 1.2  # what the hard choice would say


def test_many_members_are_shown_in_part():
    text = " ".join(str(responsibilities(torch.zeros(40, 3), torch.zeros(40), 1.0)).split())
    assert "24 members of less usage are not shown" in text


def test_scores_by_hand():
    a = torch.tensor([[-1.0, -3.0], [-2.0, -math.inf]], dtype=torch.float64)
    score = mixture_log_score(a, torch.tensor([0.75, 0.25]).log())
    wanted = [math.log(0.75 * math.exp(-1) + 0.25 * math.exp(-2)), math.log(0.75) - 3]
    assert score.mixture.tolist() == pytest.approx(wanted, abs=1e-7)
    assert score.member.tolist() == pytest.approx([-1.25, -math.inf], abs=1e-7)
    assert score.best_name == "member 0" and score.best_member == -2.0
    assert "best: member 0" in str(score)


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"\(member, unit\)"):
        responsibilities(torch.zeros(3), torch.zeros(3), 1.0)
    with pytest.raises(ShapeError, match="one log weight per member"):
        mixture_log_score(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ShapeError, match="per member"):
        responsibilities(torch.zeros(3, 2), torch.zeros(3), 1.0, names=["a"])
    with pytest.raises(ShapeError, match="each of the 2 units"):
        responsibilities(torch.zeros(3, 2), torch.zeros(3), 1.0).route_information(["a"])
    with pytest.raises(ConfigError, match="alpha"):
        responsibilities(torch.zeros(3, 2), torch.zeros(3), -1.0)
    with pytest.raises(DataError, match="NaN"):
        mixture_log_score(torch.full((2, 2), torch.nan), torch.zeros(2))


# --- of posteriors ---
def test_an_ensemble_says_who_explains_what(split):
    found = split.responsibilities()
    assert found.alpha == 0.8 and found.unit == "datum" and found.dead == ()
    assert sorted(found.usage.tolist()) == pytest.approx([0.25, 0.75], abs=0.01)
    # the label of a datum tells its member: the entropy of the shares
    told = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found.route_information(LABELS) == pytest.approx(told, abs=0.01)
    assert found.routing_entropy < 0.01
    assert found.routed_nll.tolist() == pytest.approx([ENTROPY] * 2, abs=0.02)
    new = split.responsibilities(torch.tensor([-5.0, 5.0, 0.0], dtype=torch.float64), alpha=1)
    assert new.weight.shape == (2, 3) and new.alpha == 1
    assert float(new.weight[:, :2].max(0).values.min()) > 0.999


def test_held_out_scores_are_those_of_the_fitted_mixture(split):
    score = split.mixture_log_score(SPLIT + 0.01)
    told = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert score.mixture_mean == pytest.approx(-ENTROPY - told, abs=0.01)
    # a member by itself is ten away from the other group's data
    assert score.member_mean == pytest.approx(-ENTROPY - 50 * 2 * 0.25 * 0.75, rel=0.02)
    assert score.diversity == pytest.approx(score.mixture_mean - score.member_mean)
    assert score.best_member == pytest.approx(-ENTROPY - 50 * 0.25, rel=0.02)


def test_groups_are_units(split):
    ids = torch.arange(200) // 50
    grouped = split.responsibilities(SPLIT, groups=ids)
    assert grouped.unit == "group" and grouped.unit_names == ("0", "1", "2", "3")
    assert split.mixture_log_score(SPLIT, groups=ids).mixture.shape == (4,)
    posterior = vf.fit(
        location(SPLIT, ids), "ensemble(size=2)", "renyi_predictive(alpha=0.5, unit=group)", seed=0, steps=50
    )
    own = posterior.responsibilities()
    assert own.unit == "group" and own.weight.shape == (2, 4)


def test_continuous_families_are_read_by_draws():
    posterior = vf.fit(targets.linear_regression().model, "full_rank", "elbo", seed=0)
    with pytest.raises(NotAvailableError, match="routes no data to members"):
        posterior.responsibilities()
    found = posterior.responsibilities(alpha=1.0, num_draws=50)
    assert found.weight.shape == (50, 12) and found.names[0] == "draw 0"
    score = posterior.mixture_log_score(num_draws=20_000)
    # the exact posterior predictive of each datum, one at a time
    target = targets.linear_regression()
    mean, covariance = target.moments()
    x, y = target.model.source.whole()
    sd = (0.8**2 + ((x @ covariance) * x).sum(-1)).sqrt()
    exact = torch.distributions.Normal(x @ mean, sd).log_prob(y)
    assert torch.allclose(score.mixture, exact, atol=0.02)
    assert score.diversity > 0


def test_models_without_a_likelihood_per_datum_are_refused():
    posterior = vf.fit("correlated_normal", "full_rank", seed=0)
    for ask in (lambda: posterior.responsibilities(alpha=1), posterior.mixture_log_score):
        with pytest.raises(NotAvailableError, match="log likelihood per datum"):
            ask()


def test_pictures(split, tmp_path):
    split.responsibilities().plot(tmp_path / "who.png")
    assert (tmp_path / "who.png").stat().st_size > 1000
    with pytest.raises(ShapeError, match="2 members need 2 names"):
        plots.responsibilities([[0.5], [0.5]], ["a"])
    with pytest.raises(ShapeError, match="one value per alpha"):
        plots.alpha_curve([0.0, 1.0], [1.0], [1.0, 2.0])


# --- choosing alpha ---
def test_alpha_is_chosen_by_the_mixture_and_fidelity_stands_beside_it(tmp_path):
    model, held_out = location(SPLIT[::2]), SPLIT[1::2]
    choice = vf.choose_alpha(model, held_out, alphas=(1.0, 0.0, 0.5), family="ensemble(size=2)", seed=0)
    assert [row.alpha for row in choice.rows] == [0.0, 0.5, 1.0]
    zero, half, one = (row.score for row in choice.rows)
    # at 0 both members sit at the common mean, where the mixture gains nothing; members are then best by themselves
    assert zero.diversity < 1e-3 < half.diversity
    assert zero.mixture_mean < half.mixture_mean and zero.member_mean > half.member_mean
    assert (
        choice.alpha == 0.5
        and choice.best in (0.5, 1.0)
        and one.mixture_mean == pytest.approx(half.mixture_mean, abs=0.01)
    )
    assert choice.posterior.record.objective.startswith("renyi_predictive(alpha=0.5")
    text = " ".join(str(choice).split())
    assert "0.5 *" in text and "Log scores per datum" in text
    assert len(choice.to_dict()["rows"]) == 3
    choice.plot(tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").stat().st_size > 1000


def test_choices_that_cannot_be_made_are_refused():
    model = location(SPLIT)
    with pytest.raises(ConfigError, match="per-datum objective"):
        vf.choose_alpha(model, SPLIT, objective="renyi")
    with pytest.raises(ConfigError, match="at least one alpha"):
        vf.choose_alpha(model, SPLIT, alphas=())
    with pytest.raises(ConfigError, match="held_out_groups= must name"):
        vf.choose_alpha(model, SPLIT, objective="renyi_predictive(unit=group)")
    with pytest.raises(ConfigError, match="held_out_groups= must be left out"):
        vf.choose_alpha(model, SPLIT, held_out_groups=[0] * 200)
