"""Models: one registered entry per file."""

from __future__ import annotations

from vifamily.models._base import BatchSource, Model
from vifamily.models.causal_lm import CausalLM
from vifamily.models.density import Density
from vifamily.models.likelihood import LikelihoodModel
from vifamily.models.pyro_model import PyroModel
from vifamily.models.simulator import ObservedSimulator, Simulations, Simulator

__all__ = [
    "BatchSource",
    "CausalLM",
    "Density",
    "LikelihoodModel",
    "Model",
    "ObservedSimulator",
    "PyroModel",
    "Simulations",
    "Simulator",
]
