"""The prior on adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.options import EnsembleOptions

__all__ = ["normal_prior"]


def normal_prior(model: StackedCausalLM, options: EnsembleOptions) -> Tensor:
    """Cross term of the divergence from a normal prior, averaged over members and weighted as the options say."""
    square = torch.stack([p.float().square().sum() for p in model.adapter_parameters()]).sum()
    return square * (options.prior_weight / (2 * options.prior_sd**2 * model.num_members))
