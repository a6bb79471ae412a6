"""What every weights entry shares: which layers it takes, and the network that comes of it."""

from __future__ import annotations

import abc
import dataclasses
import fnmatch
from collections.abc import Iterable

import torch
from torch import nn

from vifamily.errors import ConfigError
from vifamily.weights._base import LayerWeights
from vifamily.weights._network import NetworkWeights

__all__ = ["NetworkWeights", "WeightsEntry", "check_patterns"]

_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)


@dataclasses.dataclass(frozen=True)
class WeightsEntry(abc.ABC):
    """How the layers of a network take their weights from a latent.

    Args:
        include: Patterns (``fnmatch``, several separated by commas) on full parameter or layer names; what matches
            none stays as it is.
        exclude: Patterns of what stays as it is although ``include`` matches.

    Raises:
        ConfigError: If a pattern is no text.
    """

    include: str = "*"
    exclude: str = ""

    def __post_init__(self) -> None:
        """Check the patterns."""
        check_patterns("include", self.include)
        check_patterns("exclude", self.exclude)

    def picks(self, layer: str, parameter: str = "") -> bool:
        """Whether the patterns choose a layer, or a parameter of it (its own name, ``"weight"``)."""
        full = ".".join(part for part in (layer, parameter) if part)
        return _matches(self.include, layer, full) and not _matches(self.exclude, layer, full)

    def skips(self, net: nn.Module, name: str, module: nn.Module) -> str | None:
        """Why a layer is not even asked for, or None where it is.

        Args:
            net: The network, as it was given.
            name: Full name of the layer.
            module: The layer.
        """
        if isinstance(module, _BATCH_NORM) and not self.named_on_purpose(name, module):
            return "batch normalisation: its scale and shift stay points, its running statistics are fixed"
        if not any(self.picks(name, key) for key in own_parameters(module)):
            return "not chosen by include= and exclude="
        return None

    def named_on_purpose(self, name: str, module: nn.Module) -> bool:
        """Whether patterns that do not choose everything choose this layer; batch normalisation needs it."""
        return self.include != "*" and any(self.picks(name, key) for key in own_parameters(module))

    @abc.abstractmethod
    def layer(self, module: nn.Module, name: str, *, generator: torch.Generator) -> LayerWeights | str:
        """Make the weights of one layer.

        Args:
            module: The layer, a copy that the result may keep.
            name: Its full name in the network, ``""`` where the network is one layer.
            generator: Randomness of starting values.

        Returns:
            The weights, or why this layer is skipped.
        """

    def build(
        self,
        net: nn.Module,
        *,
        generator: torch.Generator,
        rest: str = "point",
        prior_scale: float = 1.0,
        chunk_draws: int | None = None,
    ) -> NetworkWeights:
        """Make a network whose weights come from a latent; see :class:`NetworkWeights`."""
        return NetworkWeights(
            net, self, generator=generator, rest=rest, prior_scale=prior_scale, chunk_draws=chunk_draws
        )


def check_patterns(name: str, value: object) -> None:
    """Check that an option is patterns on names.

    Raises:
        ConfigError: If it is no text.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be patterns in text, as in 'encoder.*, *.bias', got {value!r}.")


def own_parameters(module: nn.Module) -> Iterable[str]:
    """Own names of the parameters that a module holds itself."""
    return [key for key, _ in module.named_parameters(recurse=False)]


def _matches(patterns: str, layer: str, full: str) -> bool:
    found = [p.strip() for p in patterns.split(",") if p.strip()]
    return any(fnmatch.fnmatchcase(full, p) or fnmatch.fnmatchcase(layer, p) for p in found)
