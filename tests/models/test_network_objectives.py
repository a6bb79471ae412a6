"""Every objective meets a network with Walsh-Hadamard weights: it runs, or is refused for what is missing."""

import pytest
import torch
from torch import nn

import vifamily as vf
from vifamily import registry, rng
from vifamily.errors import IncompatibleError

FAMILIES = ("mean_field", "full_rank", "ensemble(size=3)", "implicit(hidden=[4])")
NEVER = {"discrete_stein", "energy_distance", "inclusive_kl", "inclusive_kl_draws", "mmd", "roc_arc_critic", "sinkhorn"}
"""For discrete latents, simulators or reference draws."""

pytestmark = pytest.mark.filterwarnings("ignore::vifamily.errors.VifamilyWarning")


def network():
    with rng.scoped(0):
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    g = rng.generator(0, "data")
    x = torch.randn(30, 2, generator=g)
    return vf.models.Network(
        net, "gaussian", (x, x[:, :1].sin() + 0.1 * torch.randn(30, 1, generator=g)), "walsh_hadamard"
    )


@pytest.mark.parametrize("name", registry.names("objectives"))
def test_it_runs_or_says_what_is_missing(name):
    ran = []
    for family in FAMILIES:
        model = network()
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        try:
            posterior = vf.fit(model, family, name, steps=3, draws=None, seed=0, progress=False)
        except IncompatibleError as refused:
            assert refused.missing
            continue
        assert bool(posterior.draws(5).isfinite().all())
        ran.append(family)
        moved = {k for k, p in posterior.model.named_parameters() if not torch.equal(p, before[k])}
        if registry.build("objectives", name).freezes_model:
            assert not moved, "diagonals and noise stay where the score alone is matched"
    assert bool(ran) is (name not in NEVER)


def test_points_move_with_the_elbo_and_stay_under_operator_vi():
    """As in practice: operator VI goes on from a fit by ELBO, whose diagonals and noise it holds."""
    first = vf.fit(network(), "mean_field", "elbo", steps=200, seed=0, progress=False)
    noise = float(first.model.likelihood.log_scale.detach())
    assert noise != float(network().likelihood.log_scale.detach())
    second = vf.fit(first.model, "mean_field", "operator", init=first, steps=20, seed=0, progress=False)
    assert float(second.model.likelihood.log_scale.detach()) == noise
    assert bool(second.draws(5).isfinite().all())
