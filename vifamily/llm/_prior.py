"""The prior on adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.stochastic import StochasticCausalLM

__all__ = ["normal_prior"]


def normal_prior(model: StackedCausalLM, options: EnsembleOptions) -> Tensor:
    """Divergence from a normal prior (of points, its cross term), a mean over members, weighted as the options say."""
    if isinstance(model, StochasticCausalLM):
        return model.divergence(options.prior_sd) * options.prior_weight
    square = torch.stack([p.float().square().sum() for p in model.adapter_parameters()]).sum()
    return square * (options.prior_weight / (2 * options.prior_sd**2 * model.num_members))
