"""Models: one registered entry per file."""

from __future__ import annotations

from vifamily.models._at_data import SimulatorAtData
from vifamily.models._base import BatchSource, Model
from vifamily.models._prediction import Prediction
from vifamily.models.causal_lm import CausalLM
from vifamily.models.density import Density
from vifamily.models.likelihood import LikelihoodModel
from vifamily.models.network import Network
from vifamily.models.pyro_model import PyroModel
from vifamily.models.random_features import RandomFourierFeatures, random_feature_network
from vifamily.models.simulator import ObservedSimulator, Simulations, Simulator

__all__ = [
    "BatchSource",
    "CausalLM",
    "Density",
    "LikelihoodModel",
    "Model",
    "Network",
    "ObservedSimulator",
    "Prediction",
    "PyroModel",
    "RandomFourierFeatures",
    "Simulations",
    "Simulator",
    "SimulatorAtData",
    "random_feature_network",
]
