"""The reproduction of operator variational inference: its pieces, and image completion on three seeds."""

import math

import pytest
import torch

from vifamily.reproduce import _operator_vi_digits as pictures
from vifamily.reproduce import paper_named
from vifamily.reproduce._operator_vi_mixture import distance_to_mixture
from vifamily.reproduce._operator_vi_programs import SwitchProgram


def test_the_paper_is_found():
    assert "Operator Variational Inference" in paper_named("operator-vi").title


def test_the_distance_is_that_of_shifted_draws():
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    low = torch.special.ndtri(grid)[::2]
    z = torch.cat([low - 3, low + 3])
    assert distance_to_mixture(z, 0.5) < 0.01
    assert distance_to_mixture(z + 0.25, 0.5) == pytest.approx(0.25, abs=0.01)


def test_the_program_starts_wide_with_half_of_its_mass_on_each_side():
    z = SwitchProgram(3)(torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).z
    assert float((z > 0).double().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(z.detach().std()) > 3.3


def made_up(images=3):
    source = torch.Generator().manual_seed(1)
    x = torch.randint(2, (images, 64), generator=source).double()
    seen = torch.rand(images, 64, generator=source) < 0.5
    weights, offset = (torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((64, 5), (64,)))
    return pictures.Digits(x, seen, 0.3 * weights, 0.1 * offset)


def test_images_side_by_side_are_images_one_by_one():
    data = made_up()
    z = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = data.model().log_joint(z)
    for i in range(3):
        logits = z[i] @ data.weights.T + data.offset
        each = torch.distributions.Bernoulli(logits=logits).log_prob(data.x[i].expand(7, 64))
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z[i]).sum(-1)
        assert torch.allclose(whole[i], prior + (each * data.seen[i]).sum(-1), atol=1e-10)


def test_weighted_scores_are_those_of_repeated_draws():
    data = made_up()
    z = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = torch.tensor([2.0, 1.0], dtype=torch.float64).log().expand(3, 2)
    wanted = pictures._scores(data, torch.cat([z[:, :1], z], 1))
    assert torch.allclose(pictures._scores(data, z, weight), wanted, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_completion_reaches_the_exact_score(seed):
    rows = {row["method"]: row for row in pictures.completion(seed, steps=800)}
    assert rows["exact"]["least_sample_size"] > 1000
    for method, within in {
        "mean field, KL": 0.3, "mean field, Langevin-Stein": 0.3, "program, Langevin-Stein": 0.6,
    }.items():  # fmt: skip
        assert rows[method]["below_exact"] < within
        assert rows[method]["score"] > rows["prior"]["score"] + 1
        assert math.isfinite(rows[method]["sd"])
