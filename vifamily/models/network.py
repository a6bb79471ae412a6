"""Bayesian neural networks: any module with a likelihood, its weights from a latent."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vifamily import registry, rng
from vifamily.errors import ConfigError, DataError, NotAvailableError, ShapeError
from vifamily.models._base import BatchSource, Model
from vifamily.models._calls import check_count
from vifamily.models._data import as_numbers, check_tensor, data_source
from vifamily.models._likelihoods import likelihood_of
from vifamily.models._prediction import Prediction
from vifamily.registry import register
from vifamily.types import Batch, Capability

__all__ = ["Network"]

_ROWS = 1000
"""Data that are looked at for checks and for where the noise begins."""
_AT_ONCE = 2**17
"""Rows of outputs (draws times inputs) that a prediction computes at once."""
_KINKS = ("Relu", "LeakyRelu", "Rrelu", "Prelu", "Hardtanh", "Hardswish", "Hardsigmoid", "Threshold", "Abs", "Sign",
          "Softshrink", "Hardshrink", "Clamp", "MaxPool", "Max", "Min", "Maximum", "Minimum")  # fmt: skip


@register("models", "network")
class Network(Model):
    r"""A neural network whose weights have a prior, with a likelihood of its outputs.

    .. math:: \log p(y, z) = \log p(z) + \frac{N}{|B|} \sum_{i \in B} \log p(y_i \mid f(x_i; w(z)))

    The latent ``z`` holds what the weights entry makes the weights from; with ``"dense"`` the weights themselves. Other
    parameters are estimated as points along with the fit. The module is copied, and evaluated in eval mode: dropout is
    off, and batch normalisation uses the running statistics that the module came with.

    Args:
        net: Any module that maps ``(datum, ...)`` to ``(datum, ...)``.
        likelihood: ``"gaussian"`` (its noise is learned), ``"gaussian(sd=0.1)"``, ``"heteroscedastic"`` (two outputs,
            mean and spread), ``"categorical"``, ``"bernoulli"``, ``"poisson"`` (log rate), ``"student_t(df=4)"``, or a
            function ``likelihood(outputs, y)`` from ``(draw, datum, ...)`` and ``(datum, ...)`` to ``(draw, datum)``.
        data: Inputs and targets ``(x, y)``, tensors with the datum axis first; or a torch ``Dataset`` or ``DataLoader``
            of such pairs.
        weights: A weights entry or its spec: ``"dense"``, ``"last_layer"``, ``"subset(pattern=...)"``,
            ``"lora(rank=4)"``.
        include: Patterns on parameter or layer names to convert, in place of the entry's.
        exclude: Patterns of what stays as it is, in place of the entry's.
        rest: What becomes of other parameters: ``"point"`` (estimated) or ``"frozen"``.
        prior_scale: Multiplies the prior standard deviations.
        chunk_draws: Draws at a time, to bound memory.
        num_data: Size of the whole data set, where the data do not know it.
        seed: Seed of starting values of the entry.
        name: A name for reports.

    Attributes:
        report: Which layers were converted, which not and why; prints as a table.

    Raises:
        ConfigError: If an argument cannot be used, or no layer is converted.
        DataError: If data are empty, not finite, or targets are impossible under the likelihood.
        ShapeError: If targets do not have the shape of the outputs.
        DeviceError: If data have another dtype or device than the network.
        ModelError: If the network raises, or gives no finite outputs.

    Source: Blundell, Cornebise, Kavukcuoglu and Wierstra (2015), "Weight uncertainty in neural networks".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
        >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> model = Network(net, "gaussian(sd=0.1)", data=(x, torch.sin(3 * x)))
        >>> model.dim, model.log_likelihood(torch.zeros(5, 25)).shape
        (25, torch.Size([5, 20]))
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Any = "gaussian",
        data: Any = None,
        weights: Any = "dense",
        *,
        include: str | None = None,
        exclude: str | None = None,
        rest: str = "point",
        prior_scale: float = 1.0,
        chunk_draws: int | None = None,
        num_data: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        if data is None:
            raise ConfigError("a network needs data=(x, y), its inputs and targets.")
        law = likelihood_of(likelihood)
        made = _entry(weights, include, exclude).build(
            net, generator=rng.generator(seed, "weights"), rest=rest, prior_scale=prior_scale, chunk_draws=chunk_draws
        )
        like = next(iter(net.parameters()))
        super().__init__(made.layout, dtype=like.dtype, device=like.device)
        self.source = data_source(data, num_data, self.dtype, self.device)
        self._num_data, self.name = self.source.num_data, name
        self.weights, self.likelihood = made, law
        y, points = self._look()
        self.likelihood.begin(y, points)
        self.capabilities = self._declared()

    @property
    def report(self) -> Any:
        """Which layers were converted, which not and why; prints as a table."""
        return self.weights.report

    def _look(self) -> tuple[Tensor, Tensor]:
        """Evaluate once on a few data: find out how draws are evaluated, and check targets against outputs.

        Returns:
            The targets that were checked, and points of the model's kind.
        """
        x, y = self._pair(self._some())
        self._one_input, self._real_inputs = x.shape[1:], x.is_floating_point()
        self.weights.settle(x)
        z = torch.stack([self.initial_gaussian(generator=rng.generator(0, "look", k))[0] for k in range(2)])
        with torch.no_grad():
            outputs = self.weights(x[:4], z)
            self.likelihood.check(y, outputs.shape[2:])
            self.likelihood.log_prob(outputs, y[:4])
        self._output_shape = outputs.shape[2:]
        self.source.check = self._check_targets
        return y, z

    def _check_targets(self, data: Any) -> None:
        """Check what a dataset or loader gives later as the first of it was checked."""
        self.likelihood.check(self._pair(data)[1], self._output_shape)

    def _some(self) -> Any:
        """All data where they are at hand, a first batch of a stream."""
        if self.source.own_batch_size is not None:
            return self.source.sample()
        # targets are checked to the last where they are tensors
        whole = isinstance(getattr(self.source, "_data", None), tuple)
        return self.source.whole() if whole else self.source.rows(torch.arange(min(_ROWS, self.source.num_data)))

    def _pair(self, data: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(data, tuple) or len(data) != 2:
            got = f"{len(data)} parts" if isinstance(data, (tuple, dict)) else type(data).__name__
            raise DataError(f"a network needs data (x, y), inputs and targets, got {got}.")
        x, y = data
        return x, y

    def _declared(self) -> frozenset[Capability]:
        out = {Capability.LOG_JOINT, Capability.PRIOR, Capability.PER_DATUM, Capability.SUBSAMPLE, Capability.SCORE}
        if self.weights.gaussian_prior:
            out |= {Capability.GAUSSIAN_PRIOR, Capability.PRIOR_DRAWS}
        if self.weights.example_noise:
            out.add(Capability.EXAMPLE_NOISE)
        if self.weights.cheap_example_noise:
            out.add(Capability.CHEAP_EXAMPLE_NOISE)
        if self.likelihood.samples:
            out.add(Capability.PREDICTIVE)
        if any(p.requires_grad for p in self.parameters()):
            out.add(Capability.POINT_PARAMETERS)
        if not self._has_kinks():
            out.add(Capability.SECOND_ORDER)
        return frozenset(out)

    def _has_kinks(self) -> bool:
        """Whether the derivative of the outputs jumps, as behind a ReLU: then second derivatives miss curvature."""
        x, y = self._pair(self.source.sample())
        z = torch.zeros(2, self.dim, dtype=self.dtype, device=self.device, requires_grad=True)
        with torch.enable_grad():
            value = self.likelihood.log_prob(self.weights(x, z), y)
        seen, waiting = set(), [value.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name().rsplit("::", 1)[-1].split("Backward")[0].rstrip("0123456789D").startswith(_KINKS):
                return True
            waiting += [following for following, _ in node.next_functions]
        return False

    # -- densities -----------------------------------------------------------------------------------------------------
    def _data_of(self, batch: Batch | None) -> tuple[Tensor, Tensor]:
        return self._pair(self.source.whole() if batch is None else batch.data)

    def _log_likelihood(self, z: Tensor, batch: Batch | None) -> Tensor:
        x, y = self._data_of(batch)
        return self.likelihood.log_prob(self.weights(x, z), y)

    def _log_likelihood_each(self, z: Tensor, batch: Batch | None) -> Tensor:
        if Capability.EXAMPLE_NOISE not in self.capabilities:
            return super()._log_likelihood_each(z, batch)
        return self._log_likelihood(z, batch)

    def _log_prior(self, z: Tensor) -> Tensor:
        prior: Tensor = self.weights.log_prior(z)
        return prior

    def _log_joint(self, z: Tensor, batch: Batch | None) -> Tensor:
        return self._log_prior(z) + self.scale(batch) * self._log_likelihood(z, batch).sum(-1)

    def gaussian_prior(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the normal prior, ``(dim,)`` each."""
        if not self.weights.gaussian_prior:
            return super().gaussian_prior()
        mean, sd = self.weights.prior()
        return mean, sd

    def kl_to_prior(self, family: Any) -> Tensor:
        """Divergence of a Gaussian family from the prior in closed form, one number per restart."""
        mean, variance = family.marginals()
        independent = Capability.FACTORISED_GAUSSIAN in family.capabilities
        cross = self.weights.cross_entropy(mean, variance, independent=independent)
        if cross is None:
            raise NotAvailableError(
                "the prior of these weights has correlated coordinates: its divergence in closed form needs a "
                "family of independent ones, such as mean_field."
            )
        kl: Tensor = cross - family.entropy()
        return kl

    def fit_prior(self, posterior: Any) -> dict[str, float]:
        r"""Set the prior scale of each layer to its best value at a posterior; then fit again from there.

        .. math:: \lambda^2 = \operatorname{mean}_k\,
                  \big[\operatorname{Var}_q z_k + (\mathbb{E}_q z_k - m_k)^2\big] / s_k^2

        One step of empirical Bayes: the maximum of the bound in the scale for a ``q`` held fixed, in closed form
        where marginal variances are enough and by 4000 draws otherwise.

        Args:
            posterior: A posterior of this model.

        Returns:
            Layer name to its new scale.

        Raises:
            ShapeError: If the posterior has other coordinates.
        """
        family = posterior.family
        if posterior.dim != self.dim:
            raise ShapeError(f"the posterior has {posterior.dim} coordinates, the model {self.dim}.")
        with torch.no_grad():
            moments = family.marginals() if Capability.GAUSSIAN in family.capabilities else None
            independent = Capability.FACTORISED_GAUSSIAN in family.capabilities
            if moments is None or self.weights.cross_entropy(*moments, independent=independent) is None:
                z = posterior.draws(4000)
                moments = z, torch.zeros_like(z)
            found: dict[str, float] = self.weights.fit_prior(*moments)
        return found

    def initial_gaussian(self, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviations where a fit should begin: those of the weights entry."""
        mean, sd = self.weights.initial(generator)
        return mean, sd

    def check_start(self, mean: Tensor, sd: Tensor) -> None:
        """Warn of starts from which the layers would put out nearly nothing."""
        self.weights.check_start(mean, sd)

    # -- randomness and data -------------------------------------------------------------------------------------------
    def sample_prior(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Draw from the prior, ``(num_draws, dim)``."""
        mean, sd = self.gaussian_prior()
        shape = (check_count(num_draws, "num_draws"), self.dim)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return mean + sd * noise.to(mean)

    def predict(self, z: Tensor, x: Any, *, chunk_draws: int | None = None) -> Prediction:
        """Predict at new inputs.

        Args:
            z: Draws, ``(draw, dim)``.
            x: Inputs, ``(datum, ...)``.
            chunk_draws: Draws at a time; by default so many that their outputs have about 100 000 rows.

        Returns:
            Outputs under each draw, with moments, intervals, scores.

        Raises:
            ConfigError: If ``chunk_draws`` is not a positive integer.
            DataError: If inputs are no numbers, or not finite.
            ShapeError: If there is no input, or inputs have not as many axes as those of the data.
            ModelError: If the network raises on these inputs.
        """
        inputs = self._inputs(x)
        size = max(_AT_ONCE // len(inputs), 1) if chunk_draws is None else check_count(chunk_draws, "chunk_draws")
        draws = z.to(self.device, self.dtype).split(size)
        with torch.no_grad():
            outputs = torch.cat([self.weights.checked(inputs, part) for part in draws])
        return Prediction(outputs, self.likelihood)

    def _inputs(self, x: Any) -> Tensor:
        """Return new inputs as the network takes them, checked."""
        found = as_numbers(x, "inputs").to(self.device)
        if self._real_inputs or found.is_floating_point():
            found = found.to(self.dtype)
        if found.dim() != 1 + len(self._one_input) or len(found) == 0:
            like = ", ".join(map(str, ("datum", *self._one_input)))
            raise ShapeError(f"inputs must be ({like}) with at least one datum, got shape {tuple(found.shape)}.")
        return check_tensor(found, "at new inputs", found.dtype, self.device)

    def predictive(self, z: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw new targets at the inputs of the data, ``(draw, dim) -> {"y": (draw, datum, ...)}``."""
        if not self.likelihood.samples:
            return super().predictive(z, generator=generator)
        x, _ = self._data_of(None)
        return {"y": self.predict(z, x).sample(generator)}

    def observed(self) -> dict[str, Tensor]:
        """Return the targets, ``{"y": (datum, ...)}``."""
        return {"y": self._data_of(None)[1]}

    def with_observed(self, data: Mapping[str, Tensor]) -> Network:
        """Return a copy with other targets ``y`` at the same inputs (see :meth:`Model.with_observed`)."""
        new = self._checked_observed(data)
        x, y = self._data_of(None)
        other = copy.deepcopy(self)
        other.source = data_source((x, new.get("y", y)), None, self.dtype, self.device)
        other._look()
        return other

    @property
    def own_batch_size(self) -> int | None:
        """Batch size of the DataLoader, where the data are one."""
        return self.source.own_batch_size

    def batches(self, batch_size: int | None, *, seed: int) -> BatchSource:
        """Return the source of minibatches: shuffled, or a DataLoader's."""
        return self.source.batches(batch_size, seed=seed)

    def batch_at(self, index: Tensor) -> Batch:
        """Return the data at given positions as a batch."""
        return Batch(self.source.rows(index), len(index), index)

    def moved(self, *, device: torch.device, dtype: torch.dtype) -> Model:
        """Return a copy whose data and parameters have another device or floating dtype."""
        other: Any = super().moved(device=device, dtype=dtype)
        other.source.moved(dtype, device)
        moved: Model = other
        return moved


def _entry(weights: Any, include: str | None, exclude: str | None) -> Any:
    entry = registry.build("weights", weights) if isinstance(weights, (str, registry.Spec)) else weights
    if not dataclasses.is_dataclass(entry) or isinstance(entry, type) or not hasattr(entry, "build"):
        raise ConfigError(
            f"weights must be the name of an entry ({', '.join(registry.names('weights'))}) or an entry, got "
            f"{type(entry).__name__}."
        )
    changes = {key: value for key, value in {"include": include, "exclude": exclude}.items() if value is not None}
    return dataclasses.replace(entry, **changes)
