"""Targets whose answers are known in closed form."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.models import Density, LikelihoodModel, Model
from vifamily.solvers._fixed_draws import balanced_draws
from vifamily.types import NoiseSpec

__all__ = [
    "Target",
    "correlated_normal",
    "discrete",
    "extreme",
    "linear_regression",
    "local_normal",
    "mean_field_sd",
    "overdispersed",
    "predictive_sd",
    "two_normals",
]

_LOG_2PI = math.log(2 * math.pi)
_NUM_DRAWS = 512
"""Reference draws of a target: few, since several contracts evaluate thousands of losses at once."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A model with its exact answer.

    Attributes:
        model: The model.
        log_evidence: Logarithm of the integral of its joint density.
        mean: Posterior mean ``(dim,)``, or None where it is not a vector of its own.
        covariance: Posterior covariance ``(dim, dim)``, or None.
    """

    model: Model
    log_evidence: float
    mean: Tensor | None = None
    covariance: Tensor | None = None

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return posterior mean and covariance.

        Raises:
            NotAvailableError: If the posterior is not described by them.
        """
        if self.mean is None or self.covariance is None:
            raise NotAvailableError("this target has no mean and covariance of its own.")
        return self.mean, self.covariance


def _normal_draws(mean: Tensor, covariance: Tensor) -> Tensor:
    """Balanced draws of a normal law, whose sample moments are exactly its own."""
    unit = balanced_draws(NoiseSpec(tuple(mean.shape)), _NUM_DRAWS, 0)
    draws: Tensor = mean + unit @ torch.linalg.cholesky(covariance).mT
    return draws


def linear_regression() -> Target:
    """Conjugate: two coefficients with normal priors, twelve data with known noise.

    Its posterior is a correlated normal law with mean away from zero, its evidence is known, and the model can do
    whatever a model in likelihood form can (prior apart, likelihood per datum, minibatches, Gaussian prior,
    predictive). It carries reference draws whose sample moments are exact.

    Returns:
        The target.

    Example:
        >>> target = linear_regression()
        >>> at_mean = target.model.log_joint(target.mean[None])[0]
        >>> posterior = torch.distributions.MultivariateNormal(target.mean, target.covariance)
        >>> bool((at_mean - posterior.log_prob(target.mean) - target.log_evidence).abs() < 1e-10)
        True
    """
    n, noise = 12, 0.8
    x = torch.stack([torch.ones(n, dtype=torch.float64), torch.linspace(-0.5, 1.5, n, dtype=torch.float64)], dim=1)
    y = 0.7 - 0.9 * x[:, 1] + 0.6 * torch.cos(7.0 * torch.arange(n, dtype=torch.float64))
    prior_mean = torch.tensor([0.5, -0.25], dtype=torch.float64)
    prior_sd = torch.tensor([1.5, 2.0], dtype=torch.float64)

    def log_likelihood(z: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        inputs, outputs = data
        return -0.5 * ((outputs - z @ inputs.mT) / noise) ** 2 - math.log(noise) - 0.5 * _LOG_2PI

    def simulate(z: Tensor, generator: torch.Generator) -> Tensor:
        mean = z @ x.mT
        return mean + noise * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)

    model = LikelihoodModel((prior_mean, prior_sd), log_likelihood, data=(x, y), dim=2, simulate=simulate)
    precision = x.mT @ x / noise**2 + torch.diag(prior_sd**-2)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (x.mT @ y / noise**2 + prior_mean / prior_sd**2)
    marginal = noise**2 * torch.eye(n, dtype=torch.float64) + x @ torch.diag(prior_sd**2) @ x.mT
    evidence = torch.distributions.MultivariateNormal(x @ prior_mean, marginal).log_prob(y)
    return Target(model.with_reference_draws(_normal_draws(mean, covariance)), float(evidence), mean, covariance)


def correlated_normal(rho: float = 0.9) -> Target:
    """Misspecified for mean field: a bivariate normal law with unit variances and correlation ``rho``.

    Args:
        rho: Correlation, inside (-1, 1).

    Returns:
        The target; its log density is normalised, and its reference draws have its exact moments.

    Raises:
        ConfigError: If ``rho`` is not inside (-1, 1).

    Example:
        >>> correlated_normal(0.5).covariance.tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    if not -1 < rho < 1:
        raise ConfigError(f"rho must lie inside (-1, 1), got {rho!r}.")
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    mean = torch.zeros_like(covariance[0])
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    model = Density(normal.log_prob, dim=2, name="correlated normal")
    return Target(model.with_reference_draws(_normal_draws(mean, covariance)), 0.0, mean, covariance)


def mean_field_sd(alpha: float, rho: float) -> float:
    r"""Standard deviation at which mean field minimises :math:`D_\alpha(q \| p)` on :func:`correlated_normal`.

    Between zero-mean normal laws with precisions :math:`t I` and :math:`\Lambda` (eigenvalues :math:`1/(1 \pm \rho)`),

    .. math:: (\alpha - 1) D_\alpha = \alpha \log t + \tfrac{1-\alpha}{2} \log|\Lambda|
              - \tfrac12 \log|\alpha t I + (1 - \alpha) \Lambda|,

    which is stationary where :math:`2 \alpha t^2 - (2\alpha - 1) S t - 2 (1 - \alpha) P = 0` with the sum S and the
    product P of the eigenvalues. At alpha = 1 this is the conditional standard deviation :math:`\sqrt{1 - \rho^2}`, at
    alpha = 0 (in the limit) the marginal one, 1; beyond, it is narrower and wider still. For alpha < 0 the divergence
    is negative and the point is where its size is least.

    Args:
        alpha: Any finite order.
        rho: Correlation, inside (-1, 1).

    Returns:
        The standard deviation of each coordinate of q.

    Raises:
        ConfigError: If alpha is not finite.

    Example:
        >>> [round(mean_field_sd(alpha, 0.9), 4) for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0)]
        [1.1974, 1.0, 0.6602, 0.4359, 0.364]
    """
    if not math.isfinite(alpha):
        raise ConfigError(f"the order must be finite, got {alpha!r}.")
    total, product = 2 / (1 - rho**2), 1 / (1 - rho**2)
    linear = (2 * alpha - 1) * total
    root = math.sqrt(linear**2 + 16 * alpha * (1 - alpha) * product)
    # two forms of one root of the quadratic: each loses digits where the other does not
    precision = (linear + root) / (4 * alpha) if linear >= 0 else 4 * (1 - alpha) * product / (root - linear)
    return 1 / math.sqrt(precision)


_SPREAD_DATA, _SPREAD_VARIANCE, _SPREAD_PRIOR_SD = 400, 2.0, 10.0


def overdispersed() -> Target:
    """Misspecified: a location model of unit noise on 400 data of mean zero and variance two.

    Returns:
        The target.

    Example:
        >>> target = overdispersed()
        >>> target.model.num_data, round(float(target.covariance[0, 0]) * 400, 4)
        (400, 1.0)
    """
    n = _SPREAD_DATA
    y = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    y = y * (_SPREAD_VARIANCE / y.square().mean()).sqrt()

    def log_likelihood(z: Tensor, data: Tensor) -> Tensor:
        return -0.5 * (data - z) ** 2 - 0.5 * _LOG_2PI

    model = LikelihoodModel((0.0, _SPREAD_PRIOR_SD), log_likelihood, data=y, dim=1)
    precision = n + _SPREAD_PRIOR_SD**-2
    evidence = -0.5 * (n * _SPREAD_VARIANCE + n * _LOG_2PI + math.log(precision * _SPREAD_PRIOR_SD**2))
    return Target(
        model,
        evidence,
        torch.zeros(1, dtype=torch.float64),
        torch.full((1, 1), 1 / precision, dtype=torch.float64),
    )


def predictive_sd(alpha: float) -> float:
    r"""Standard deviation of the Gaussian that minimises the per-datum Rényi objective on :func:`overdispersed`.

    With the mean at zero and variance v of q, data variance V and prior variance P, the loss is

    .. math:: N \Big\{ \frac{\log(1 + \alpha v)}{2 \alpha} + \frac{V}{2 (1 + \alpha v)} \Big\}
              + \tfrac12 \Big( \frac{v}{P} - \log v \Big) + \mathrm{const},

    whose derivative in v has one sign change. With many data v tends to max(0, V - 1/alpha).

    Args:
        alpha: Any finite order from 0.

    Returns:
        The standard deviation.

    Raises:
        ConfigError: If alpha is negative or not finite.

    Example:
        >>> [round(predictive_sd(alpha), 4) for alpha in (0.0, 0.4, 0.8, 1.0)]
        [0.05, 0.111, 0.8721, 1.0049]
    """
    if not 0 <= alpha < math.inf:
        raise ConfigError(f"the order must be finite and not negative, got {alpha!r}.")
    n, spread, prior = _SPREAD_DATA, _SPREAD_VARIANCE, _SPREAD_PRIOR_SD**2

    def slope(v: float) -> float:
        u = 1 + alpha * v
        return n * (1 / u - alpha * spread / u**2) + 1 / prior - 1 / v

    low, high = 1e-9, 1e3
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.sqrt(low)


def two_normals() -> Target:
    """The equal mixture of N(-3, 1) and N(3, 1), normalised: several families of answers, local minima included.

    Returns:
        The target.

    Example:
        >>> round(float(two_normals().model.log_joint(torch.zeros(1, 1, dtype=torch.float64))), 4)
        -5.4189
    """

    def log_prob(z: Tensor) -> Tensor:
        each = torch.stack([-0.5 * (z[:, 0] - c) ** 2 for c in (-3.0, 3.0)])
        return torch.logsumexp(each, 0) - math.log(2) - 0.5 * _LOG_2PI

    mean, covariance = torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 10.0, dtype=torch.float64)
    each = _normal_draws(mean, torch.eye(1, dtype=torch.float64))
    model = Density(log_prob, dim=1, name="two normals").with_reference_draws(torch.cat([each - 3, each + 3]))
    return Target(model, 0.0, mean, covariance)


def discrete() -> Target:
    """A discrete target: coordinates of two and three categories with dependent, unnormalised probabilities.

    Returns:
        The target; its log evidence is the log of the sum over the six states. Its reference draws hold each state in
        proportion to its probability, rounded to whole draws.

    Example:
        >>> discrete().model.num_categories
        (2, 3)
    """
    table = torch.tensor([[0.3, -1.0, 0.6], [-0.7, 0.9, -0.2]], dtype=torch.float64)

    def log_prob(theta: dict[str, Tensor]) -> Tensor:
        return table[theta["a"].long(), theta["b"].long()]

    model = Density(log_prob, parameters={"a": "integer_interval(0, 1)", "b": "integer_interval(0, 2)"})
    states = torch.cartesian_prod(torch.arange(2), torch.arange(3)).double()
    times = (4 * _NUM_DRAWS * table.flatten().softmax(0)).round().long()
    draws = states.repeat_interleave(times, 0)
    return Target(model.with_reference_draws(draws), float(table.logsumexp((0, 1))))


def local_normal() -> Target:
    """Only local latents: ``code_n ~ N(0, 1)`` and ``y_n ~ N(code_n, 0.7)`` for six data.

    Returns:
        The target; its evidence is that of ``y_n ~ N(0, sqrt(1.49))``. The exact posterior of a code is normal with
        mean ``y_n / 1.49`` and variance ``0.49 / 1.49``.

    Example:
        >>> target = local_normal()
        >>> target.model.dim, target.model.local_dim, target.model.num_data
        (0, 1, 6)
    """
    y = torch.tensor([-1.2, 0.4, 2.0, -0.3, 0.9, 1.5], dtype=torch.float64)
    noise = 0.7

    def log_local(theta: dict[str, Tensor], local: dict[str, Tensor], data: Tensor) -> Tensor:
        code = local["code"]
        return -0.5 * code**2 - 0.5 * ((data - code) / noise) ** 2 - math.log(noise) - _LOG_2PI

    model = LikelihoodModel(None, data=y, local={"code": ((), "real")}, log_local=log_local)
    spread = torch.tensor(math.sqrt(1 + noise**2), dtype=torch.float64)
    return Target(model, float(torch.distributions.Normal(torch.zeros_like(spread), spread).log_prob(y).sum()))


def extreme() -> Target:
    """A log density that jumps between -1e4 and 1e4 within reach of standard normal draws.

    Returns:
        The target; it has no finite evidence, only finite values and gradients. Its reference draws lie 1e4 away.

    Example:
        >>> extreme().model.log_joint(torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
        tensor([-10000.,  10000.], dtype=torch.float64)
    """
    model = Density(lambda z: 1e4 * torch.tanh(40 * z[:, 0]), dim=2, name="extreme")
    far = 1e4 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1e-4]], dtype=torch.float64)
    return Target(model.with_reference_draws(far), math.inf)
