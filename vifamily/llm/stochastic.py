r"""Baselines with one uncertain adapter: mean field (Bayes by backprop) and dropout, their draws as members.

The stack of members serves for draws: each of them is one member, all share what is trained. At ``renyi_alpha=0`` the
loss of a step is then the mean over draws of the negative log likelihood, that of Bayes by backprop and of Monte-Carlo
dropout; above it is the black-box alpha energy. After training the draws are ordinary adapters.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vifamily.errors import CheckpointError, ConfigError
from vifamily.llm._extra import require
from vifamily.llm._layers import StackedLoRA
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm._targets import features
from vifamily.llm.adapter_files import read_tensors
from vifamily.report import write_bytes
from vifamily.rng import generator

__all__ = ["FAMILIES", "StochasticCausalLM"]

FAMILIES = ("mean_field", "dropout")
"""How the one adapter is uncertain."""

_FILE = "posterior.safetensors"


class StochasticCausalLM(StackedCausalLM):
    r"""One adapter with a distribution over it; members are its draws.

    ``"mean_field"``: entries of the matrices are independent and normal,

    .. math:: A \sim \mathrm{N}(\mu_A, \sigma_A^2), \quad B \sim \mathrm{N}(\mu_B, \sigma_B^2), \qquad
              \text{prior: } A \sim \mathrm{N}(0, s^2 / \text{fan-in}), \quad B \sim \mathrm{N}(0, s^2),

    with s the option ``prior_sd`` and the divergence weighted by ``prior_weight``, for the ELBO one over the number of
    items that the loss averages over. ``"dropout"``: inputs of the first matrix are dropped with one mask for all
    tokens of a draw, and what is left is divided by the share that is kept, as in PEFT's ``lora_dropout``; masks are
    drawn at evaluation too.

    Args:
        base: A causal language model of transformers.
        config: A ``peft.LoraConfig``, with ``lora_dropout=0``.
        num_members: Draws in a step, and draws that are kept in the end.
        family: One of :data:`FAMILIES`.
        dropout: Probability of being dropped.
        initial_sd: Standard deviation at the start, relative to the prior's.
        seed: Seed of the start and of all draws.
        options: Further arguments of :class:`~vifamily.llm.StackedCausalLM`.

    Attributes:
        posterior: What is trained.
        family: As given.

    Raises:
        ConfigError: If the family is unknown or a number is out of range.

    Example:
        >>> model = StochasticCausalLM(base, LoraConfig(r=8), 4, family="mean_field")  # doctest: +SKIP
        >>> trainer = SFTEnsembleTrainer(model, args, records, processing_class=tokenizer,
        ...     options=EnsembleOptions(renyi_alpha=0.0, prior_weight=1e-5))  # doctest: +SKIP
    """

    def __init__(
        self,
        base: nn.Module,
        config: Any,
        num_members: int,
        *,
        family: str,
        dropout: float = 0.1,
        initial_sd: float = 0.01,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if family not in FAMILIES:
            raise ConfigError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}.")
        if not 0 < dropout < 1:
            raise ConfigError(f"dropout must be a probability between 0 and 1, got {dropout!r}.")
        if not initial_sd > 0:
            raise ConfigError(f"initial_sd must be positive, got {initial_sd!r}.")
        super().__init__(base, config, num_members, seed=seed, **options)
        self.family, self._dropout, self._seed = family, dropout, seed
        made: list[nn.Parameter] = []
        for _, layer in self.lora_adapters():
            for name in ("lora_A", "lora_B"):
                mean = getattr(layer, name).detach()[:1].clone()
                made.append(nn.Parameter(mean))
                if family == "mean_field":
                    sd = initial_sd * _prior_sd(layer, name, 1.0)
                    made.append(nn.Parameter(torch.full_like(mean, math.log(math.expm1(sd)))))
                delattr(layer, name)  # from here on a draw, no parameter
        self.posterior = nn.ParameterList(made)
        self.redraw()

    @property
    def device(self) -> torch.device:
        """Where the adapter is."""
        if "posterior" not in self._modules:  # the stack is still being made
            return super().device
        where: torch.device = self.posterior[0].device
        return where

    def adapter_parameters(self) -> Any:
        """What is trained, ``(1, ...)`` each."""
        yield from self.posterior

    def redraw(self, *step: int) -> None:
        """Draw all members anew; those of no step are what is evaluated and saved.

        Args:
            step: What the draws depend on beside the seed.
        """
        source = generator(self._seed, "llm/draw/training" if step else "llm/draw/evaluation", *step)
        self._noise: list[tuple[Tensor, Tensor]] = []
        for _, _layer, parts in self._layers():
            shapes = [(self.num_members, *part[0].shape[1:]) for part in parts]
            if self.family == "mean_field":
                a, b = (torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes)
            else:
                kept = torch.rand(self.num_members, 1, shapes[0][-1], generator=source) >= self._dropout
                a, b = kept.double() / (1 - self._dropout), torch.ones(self.num_members, 1, 1, dtype=torch.float64)
            self._noise.append((a, b))
        with torch.no_grad():
            self._place()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Evaluate the draws; see :class:`~vifamily.llm.StackedCausalLM`."""
        self._place()  # a graph of its own for each call, from the same noise
        return super().forward(*args, **kwargs)

    def divergence(self, prior_sd: float) -> Tensor:
        r"""Divergence of the adapter from its prior; of dropout the cross term, as for points.

        Args:
            prior_sd: s of the class.

        Returns:
            A scalar; for mean field
            :math:`\sum \log(s/\sigma) + (\sigma^2 + \mu^2) / (2 s^2) - \tfrac12`.
        """
        out = []
        for _, layer, parts in self._layers():
            for name, part in zip(("lora_A", "lora_B"), parts, strict=True):
                s = _prior_sd(layer, name, prior_sd)
                mean = part[0].float() if part[0].dtype != torch.float64 else part[0]
                term = mean.square() / (2 * s**2)
                if self.family == "mean_field":
                    sd = softplus(part[1]).to(mean)
                    term = term + sd.square() / (2 * s**2) - (sd / s).log() - 0.5
                out.append(term.sum())
        return torch.stack(out).sum()

    def save_posterior(self, folder: str | Path) -> None:
        """Write what is trained, to go on from it."""
        save = require("safetensors.torch", "saving a posterior").save
        content = {str(i): p.detach().cpu().contiguous() for i, p in enumerate(self.posterior)}
        write_bytes(Path(folder) / _FILE, save(content, metadata={"family": self.family}))

    @torch.no_grad()
    def load_posterior(self, folder: str | Path) -> None:
        """Read what :meth:`save_posterior` wrote.

        Raises:
            CheckpointError: If it is missing, or of another form.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {_FILE}: it is of an ensemble of points, or is half-written.")
        found = read_tensors(path)
        own = {str(i): p for i, p in enumerate(self.posterior)}
        if {n: v.shape for n, v in found.items()} != {n: v.shape for n, v in own.items()}:
            raise CheckpointError(f"{path} is of an adapter of another form or family.")
        for name, value in own.items():
            value.copy_(found[name])

    # --- parts ---

    def _layers(self) -> Any:
        """Layers with the parameters of their two matrices."""
        each = 2 if self.family == "mean_field" else 1
        parts = list(self.posterior)
        for i, (name, layer) in enumerate(self.lora_adapters()):
            own = parts[2 * each * i : 2 * each * (i + 1)]
            yield name, layer, (own[:each], own[each:])

    def _place(self) -> None:
        for (_, layer, parts), noises in zip(self._layers(), self._noise, strict=True):
            for name, part, noise in zip(("lora_A", "lora_B"), parts, noises, strict=True):
                noise = noise.to(part[0])
                drawn = part[0] + softplus(part[1]) * noise if self.family == "mean_field" else part[0] * noise
                setattr(layer, name, drawn)


def _prior_sd(layer: StackedLoRA, name: str, prior_sd: float) -> float:
    """The prior of the entry ``lora`` of the weights registry."""
    return prior_sd / math.sqrt(features(layer.base_layer)[0]) if name == "lora_A" else prior_sd
