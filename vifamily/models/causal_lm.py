"""A causal language model whose adapters are latent."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, logsigmoid

from vifamily import registry
from vifamily.errors import ConfigError, DataError
from vifamily.models._base import Model
from vifamily.models.likelihood import LikelihoodModel
from vifamily.registry import register
from vifamily.rng import generator

__all__ = ["CausalLM"]


@register("models", "causal_lm")
class CausalLM(LikelihoodModel):
    r"""A frozen causal language model with a latent change of some of its weights: a model like any other.

    A datum is an answer, with :math:`\log p(y \mid x, z) = \sum_t \log p(y_t \mid x, y_{<t}, z)` over its scored
    tokens, or a preference, with :math:`\log \sigma(\beta \Delta(z))` and the margin :math:`\Delta` of the log ratios
    of the two answers to those of the base. What is latent is an entry of the weights registry; ``"lora"`` makes
    low-rank adapters. All draws run through the base at once and whole logits are formed, which is for small models;
    ensembles on large ones are trained by :class:`vifamily.llm.trainer.SFTEnsembleTrainer`, whose loss this is.

    Args:
        base: A causal language model of transformers; a copy is kept, in evaluation mode.
        rows: Rows with ``prompt_ids``, ``completion_ids`` and ``scored``, or with ``prompt_ids``, ``chosen_ids`` and
            ``rejected_ids``, as :func:`~vifamily.llm.data.prepare_sft` and
            :func:`~vifamily.llm.data.prepare_pairs` make them. Where every row has a ``group``, these are the groups of
            the model (``unit="group"``).
        weights: What is latent, an entry with its options: ``"lora(rank=4, include='*q_proj, *v_proj')"``.
        beta: For preferences.
        prior_scale: Multiplies the standard deviations of the entry's prior.
        seed: Root seed of what the entry draws when it is built.
        name: A name for reports.

    Attributes:
        adapted: The base with its latent layers.
        layer_names: Names in the base of the layers that are latent, in the order of the latent's coordinates.

    Raises:
        ConfigError: If no layer is chosen, or a number is out of range.
        DataError: If there are no rows, or they are of two kinds.

    Example:
        >>> base = AutoModelForCausalLM.from_pretrained("my-small-model")  # doctest: +SKIP
        >>> model = CausalLM(base, prepare_sft(records, tokenizer))  # doctest: +SKIP
        >>> vf.fit(model, family="ensemble(size=4)", objective="renyi_predictive(alpha=0.8)")  # doctest: +SKIP
    """

    def __init__(
        self,
        base: nn.Module,
        rows: Sequence[Any],
        *,
        weights: str = "lora(rank=4, include='*q_proj, *v_proj')",
        beta: float = 0.1,
        prior_scale: float = 1.0,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        for what, value in (("beta", beta), ("prior_scale", prior_scale)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"{what} must be a positive number, got {value!r}.")
        some = list(rows)
        pairs = _kind(some)
        likelihood = _Likelihood(base, weights, beta, seed)
        data = _tensors(some, pairs=pairs)
        dtype, device = likelihood.dtype, likelihood.device
        data = {key: value.to(device) for key, value in data.items()}
        if pairs:
            data["reference"] = likelihood.reference(data)
        groups = [getattr(row, "group", None) for row in some]
        mean, sd = likelihood.prior()
        super().__init__(
            (mean, prior_scale * sd),
            likelihood,
            data=data,
            dim=likelihood.dim,
            groups=None if None in groups else groups,
            dtype=dtype,
            device=device,
            name=name,
        )
        self.adapted, self.layer_names = likelihood, likelihood.names

    def initial_gaussian(self, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where a fit should begin, as the weights entry says: adapters that change nothing yet."""
        return self.adapted.initial(generator)

    def moved(self, *, device: torch.device, dtype: torch.dtype) -> Model:
        """Return a copy on another device or in another floating dtype."""
        other = super().moved(device=device, dtype=dtype)
        if isinstance(other, CausalLM):
            other.adapted.to(device, dtype)
        return other


class _Likelihood:
    """Log likelihoods of rows as a function of a flat latent; holds the base, which is no parameter of the model.

    Args:
        base: The language model.
        weights: Which layers are latent, and how.
        beta: For preferences.
        seed: Root seed.
    """

    def __init__(self, base: nn.Module, weights: str, beta: float, seed: int) -> None:
        if not isinstance(base, nn.Module) or getattr(base, "get_output_embeddings", None) is None:
            raise ConfigError(f"base must be a causal language model of transformers, got {type(base).__name__}.")
        self.beta = beta
        self.base = copy.deepcopy(base).eval().requires_grad_(requires_grad=False)
        first = next(p for p in self.base.parameters() if p.is_floating_point())
        self.dtype, self.device = first.dtype, first.device
        entry = registry.build("weights", weights)
        source = generator(seed, "causal_lm/weights")
        head = self.base.get_output_embeddings()  # type: ignore[operator]
        found: dict[str, _Latent] = {}
        for path, module in list(self.base.named_modules()):
            if module is head or not path or isinstance(module, nn.Embedding) or list(module.children()):
                continue
            if not list(module.parameters(recurse=False)) or entry.skips(self.base, path, module) is not None:
                continue
            made = entry.layer(copy.deepcopy(module), path, generator=source)
            if not isinstance(made, str):
                found[path] = _Latent(made)
        if not found:
            raise ConfigError(
                f"weights={weights!r} chooses no layer of {type(base).__name__}: write patterns for include=, such as "
                "'*q_proj, *v_proj'."
            )
        for path, latent in found.items():
            parent, _, last = path.rpartition(".")
            setattr(self.base.get_submodule(parent), last, latent)
        self.base.requires_grad_(requires_grad=False)
        self.names = tuple(found)
        self._plain = {path: base.get_submodule(path) for path in found}
        self._latents = list(found.values())
        self.dim = sum(latent.weights.dim for latent in self._latents)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the base."""
        self.base.to(device=device, dtype=dtype)
        self.device, self.dtype = device, dtype

    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent, ``(dim,)`` each."""
        parts = [latent.weights.prior() for latent in self._latents]
        return torch.cat([mean for mean, _ in parts]), torch.cat([sd for _, sd in parts])

    def initial(self, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation where a fit begins, ``(dim,)`` each."""
        parts = [latent.weights.initial(source) for latent in self._latents]
        return torch.cat([mean for mean, _ in parts]), torch.cat([sd for _, sd in parts])

    def __call__(self, z: Tensor, data: dict[str, Tensor]) -> Tensor:
        """Log likelihood of each row or pair, ``(draw, datum)``."""
        draws = len(z)
        parts = z.split([latent.weights.dim for latent in self._latents], -1)
        for latent, part in zip(self._latents, parts, strict=True):
            latent.z = part
        try:
            value = self._row_log_prob(data, draws)
        finally:
            for latent in self._latents:
                latent.z = None
        if "reference" not in data:
            return value
        gain = value.unflatten(1, (-1, 2)) - data["reference"]
        decided: Tensor = logsigmoid(self.beta * (gain[..., 0] - gain[..., 1]))
        return decided

    @torch.no_grad()
    def reference(self, data: dict[str, Tensor]) -> Tensor:
        """Log likelihood of both answers of each pair under the base, ``(pair, 2)``."""
        both: Tensor = self._row_log_prob(data, 1)[0].unflatten(0, (-1, 2))
        return both

    def _row_log_prob(self, data: dict[str, Tensor], draws: int) -> Tensor:
        ids, seen, scored = (data[key].flatten(0, -2) for key in ("input_ids", "attention_mask", "completion_mask"))
        with sdpa_kernel(SDPBackend.MATH):  # the only attention of torch with second derivatives
            logits = self.base(
                input_ids=ids.repeat(draws, 1), attention_mask=seen.repeat(draws, 1), use_cache=False
            ).logits[:, :-1]
        each = -cross_entropy(logits.transpose(1, 2), ids[:, 1:].repeat(draws, 1), reduction="none")
        kept = torch.where(scored[:, 1:].bool().repeat(draws, 1), each, torch.zeros_like(each))
        summed: Tensor = kept.sum(-1).unflatten(0, (draws, len(ids)))
        return summed


class _Latent(nn.Module):
    """A layer of the base that takes its weights from a slice of the latent, or is as it was while there is none."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weights = weights
        self.z: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to rows that come draw by draw."""
        z = self.z
        if z is None:
            mean, _ = self.weights.prior()
            z = torch.zeros_like(mean).unsqueeze(0)
        out: Tensor = self.weights(x.unflatten(0, (len(z), -1)), z)
        return out.flatten(0, 1)


# --- rows ---


def _kind(rows: Sequence[Any]) -> bool:
    """Whether rows are preferences."""
    pairs = [hasattr(row, "chosen_ids") for row in rows]
    if not rows or any(pairs) is not all(pairs) or not all(hasattr(row, "prompt_ids") for row in rows):
        raise DataError("rows must be those of prepare_sft or of prepare_pairs, at least one and of one kind.")
    return pairs[0]


def _tensors(rows: Sequence[Any], *, pairs: bool) -> dict[str, Tensor]:
    """Padded ids and masks, ``(row, token)``; ``(pair, 2, token)`` with the chosen answer first."""
    answers = [
        ((row.chosen_ids, None), (row.rejected_ids, None)) if pairs else ((row.completion_ids, row.scored),)
        for row in rows
    ]
    width = max(len(row.prompt_ids) + len(ids) for row, both in zip(rows, answers, strict=True) for ids, _ in both)
    shape = (len(rows), 2 if pairs else 1, width)
    out = {key: torch.zeros(shape, dtype=torch.long) for key in ("input_ids", "attention_mask", "completion_mask")}
    for i, (row, both) in enumerate(zip(rows, answers, strict=True)):
        for j, (ids, scored) in enumerate(both):
            start, end = len(row.prompt_ids), len(row.prompt_ids) + len(ids)
            out["input_ids"][i, j, :end] = torch.tensor([*row.prompt_ids, *ids])
            out["attention_mask"][i, j, :end] = 1
            out["completion_mask"][i, j, start:end] = torch.tensor([True] * len(ids) if scored is None else scored)
    return out if pairs else {key: value.squeeze(1) for key, value in out.items()}
