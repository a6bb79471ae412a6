"""A Brownian path with unknown scales and a gap."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vifamily.models import Density
from vifamily.problems._base import Problem
from vifamily.problems._densities import log_normal_log_density, normal_log_density
from vifamily.problems._folder import find_folder, read_folder
from vifamily.registry import register

__all__ = ["brownian_unknown_scales"]


@register("problems", "brownian_unknown_scales")
def brownian_unknown_scales() -> Problem:
    r"""Brownian path of 30 steps with unknown scales, its middle third unobserved: a chain and a funnel.

    .. math:: s, r \sim \mathrm{LogNormal}(0, 2), \qquad x_1 \sim N(0, s), \quad x_t \sim N(x_{t-1}, s), \qquad y_t \sim
        N(x_t, r)\ \text{where observed}

    Target of the inference-gym collection. The reference moments are exact, by quadrature over both log scales with the
    path integrated in closed form.

    Returns:
        The problem, with parameters ``innovation_noise_scale`` :math:`s`, ``observation_noise_scale`` :math:`r` and
        ``locs`` :math:`x`; exact moments, no draws.

    Raises:
        ReferenceDataError: If the reference data are not on this machine.
    """
    data, reference = read_folder(find_folder("inference_gym", "brownian_unknown_scales"))
    observed = torch.from_numpy(data["observed"]).double()
    seen = torch.nonzero(~observed.isnan()).squeeze(-1)
    values = observed[seen]

    def log_prob(theta: dict[str, Tensor]) -> Tensor:
        innovation, noise, path = theta["innovation_noise_scale"], theta["observation_noise_scale"], theta["locs"]
        steps = torch.cat([path[..., :1], path[..., 1:] - path[..., :-1]], dim=-1)
        return (
            log_normal_log_density(innovation, 0.0, 2.0)
            + log_normal_log_density(noise, 0.0, 2.0)
            + normal_log_density(steps, 0.0, innovation.unsqueeze(-1)).sum(-1)
            + normal_log_density(values, path[..., seen], noise.unsqueeze(-1)).sum(-1)
        )

    parameters = {
        "innovation_noise_scale": "positive",
        "observation_noise_scale": "positive",
        "locs": ((len(observed),), "real"),
    }
    return Problem(
        "brownian_unknown_scales",
        Density(log_prob, parameters=parameters, name="brownian_unknown_scales"),
        dataclasses.replace(reference, kind="quadrature"),
        "Brownian path with a gap and unknown scales: chain correlation and a funnel.",
    )
