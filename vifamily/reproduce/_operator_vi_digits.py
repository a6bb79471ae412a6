"""The paper's image completion in miniature: logistic factor analysis of 8x8 digits, half of each image hidden.

One posterior per image. The images are the restart axis of the objectives: a hundred families and a hundred critics,
each image's own, go through the same code as one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily import registry
from vifamily.families._stack import StackedFamily
from vifamily.models import Density
from vifamily.rng import NoiseStream, draw_noise, generator
from vifamily.solvers import Task
from vifamily.types import LatentSpec, NoiseSpec

__all__ = ["METHODS", "Digits", "completion", "digits"]

_LATENTS = 5
_DRAWS = 32
_PREDICTIVE = 4000


@dataclasses.dataclass(frozen=True)
class Digits:
    """Test images with half of their pixels hidden, and the fitted factor model.

    Attributes:
        x: Binary pixels ``(image, 64)``.
        seen: Which are observed, ``(image, 64)``.
        weights: ``(64, latent)``.
        offset: ``(64,)``.
    """

    x: Tensor
    seen: Tensor
    weights: Tensor
    offset: Tensor

    def log_likelihood(self, z: Tensor, which: Tensor) -> Tensor:
        """Log probability of some of the pixels, ``(image, draw, latent) -> (image, draw)``."""
        logits = z @ self.weights.T + self.offset
        sign = (2 * self.x - 1).unsqueeze(1)
        return (torch.nn.functional.logsigmoid(sign * logits) * which.unsqueeze(1)).sum(-1)

    def log_joint(self, z: Tensor) -> Tensor:
        """Log joint of latents and observed pixels, ``(image, draw, latent) -> (image, draw)``."""
        prior = -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
        return prior + self.log_likelihood(z, self.seen.to(z))

    def model(self) -> Density:
        """All images as one density; points of image i are the i-th part of the draws."""
        images = self.x.shape[0]
        return Density(lambda z: self.log_joint(z.reshape(images, -1, z.shape[-1])).reshape(-1), dim=_LATENTS)


def digits(seed: int, images: int = 100, steps: int = 700) -> Digits:
    """Split, binarise and hide; weights by a joint fit of mean field with reverse KL to the other images.

    Args:
        seed: Of split, hidden pixels and fit.
        images: Test images.
        steps: Steps of Adam on all other images.
    """
    from sklearn.datasets import load_digits

    source = generator(seed, "digits")
    pixels = torch.as_tensor(load_digits().data >= 8, dtype=torch.float64)
    pixels = pixels[torch.randperm(len(pixels), generator=source)]
    test, train = pixels[:images], pixels[100:]
    order = torch.rand(images, 64, generator=source).argsort(-1)
    weights, offset = _fit_weights(train, source, steps)
    return Digits(test, order < 32, weights, offset)


def _fit_weights(x: Tensor, source: torch.Generator, steps: int) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    weights = (0.1 * torch.randn(64, _LATENTS, generator=source, dtype=torch.float64)).requires_grad_()
    offset = torch.zeros(64, **options)
    mean, log_sd = torch.zeros(len(x), _LATENTS, **options), torch.full((len(x), _LATENTS), -0.5, **options)
    optimiser = torch.optim.Adam([weights, offset, mean, log_sd], lr=0.03, foreach=False)
    sign = 2 * x - 1
    for _ in range(steps):
        e = torch.randn(mean.shape, generator=source, dtype=torch.float64)
        z = mean + log_sd.exp() * e
        fit = torch.nn.functional.logsigmoid(sign * (z @ weights.T + offset)).sum()
        divergence = (0.5 * (mean.square() + (2 * log_sd).exp()) - log_sd).sum()
        optimiser.zero_grad()
        ((divergence - fit) / len(x)).backward()
        optimiser.step()
    return weights.detach(), offset.detach()


METHODS: Mapping[str, tuple[str, str, str]] = {
    "mean field, KL": ("mean_field", "elbo(estimator=entropy)", "adam"),
    "mean field, Langevin-Stein": ("mean_field", "operator(hidden=[10, 10])", "two_player"),
    "program, Langevin-Stein": ("implicit(hidden=[10, 10])", "operator(hidden=[10, 10])", "two_player"),
}
"""Family, objective and solver of each method, by name."""


def fitted(data: Digits, method: str, seed: int, steps: int) -> tuple[StackedFamily, tuple[str, ...]]:
    """Fit all images side by side.

    Args:
        data: The images.
        method: One of :data:`METHODS`.
        seed: Root seed.
        steps: Most steps.

    Returns:
        The families, and the notes of the run.
    """
    spec, loss, way = METHODS[method]
    model, images = data.model(), data.x.shape[0]
    source = generator(seed, "families")
    # the prior is where they start: wider than any posterior here
    members = [registry.build("families", spec).build(LatentSpec(_LATENTS), generator=source) for _ in range(images)]
    objective, solver = registry.build("objectives", loss), registry.build("solvers", way)
    family = StackedFamily(members)
    stream = NoiseStream(seed, family.noise_spec, draws=_DRAWS, restarts=images, balanced=True)
    half = draw_noise(family.noise_spec, (32,), generator(seed, "monitor"))
    task = Task(
        objective.loss, model, family, stream.at, lambda step: None, torch.cat([half, -half]).expand(images, -1, -1),
        images, members[0].step_size, objective.init_state(model, family, generator=generator(seed, "objective")),
        draws=_DRAWS, seed=seed, objective=objective,
    )  # fmt: skip
    run = solver.start(task)
    while run.step_count < steps and run.finished is None:
        run.step()
    return family, tuple(run.output()["notes"])


@torch.no_grad()
def _scores(data: Digits, z: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """Log probability of the hidden pixels of each image, averaged over weighted draws, ``(image,)``."""
    out = data.log_likelihood(z, (~data.seen).to(z))
    if log_weight is None:
        return out.logsumexp(-1) - math.log(out.shape[-1])
    return (out + log_weight).logsumexp(-1) - log_weight.logsumexp(-1)


@torch.no_grad()
def _exact(data: Digits, mean: Tensor, sd: Tensor, seed: int, draws: int = 20_000) -> tuple[Tensor, float]:
    """Scores under the posterior itself, by importance sampling from a wider Gaussian, and the least sample size."""
    source = generator(seed, "exact")
    scores, sizes = [], []
    for i in range(0, data.x.shape[0], 10):
        part = Digits(data.x[i : i + 10], data.seen[i : i + 10], data.weights, data.offset)
        e = torch.randn(part.x.shape[0], draws, _LATENTS, generator=source, dtype=torch.float64)
        wide = 1.5 * sd[i : i + 10].unsqueeze(1)
        z = mean[i : i + 10].unsqueeze(1) + wide * e
        log_weight = part.log_joint(z) + 0.5 * e.square().sum(-1) + wide.log().sum(-1)
        scores.append(_scores(part, z, log_weight))
        sizes.append(1 / log_weight.softmax(-1).square().sum(-1))
    return torch.cat(scores), float(torch.cat(sizes).min())


def completion(seed: int, *, images: int = 100, steps: int = 2000) -> list[dict[str, Any]]:
    """Score every method on the hidden pixels: the mean over images of ``log p(hidden | seen)``.

    Args:
        seed: Of data and fits.
        images: Test images.
        steps: Most steps of each fit.

    Returns:
        Rows with ``method``, ``score``, its standard error over images (``error``), the shortfall against the exact
        row (``below_exact``), the mean sd of the latents (``sd``).
    """
    data = digits(seed, images)
    prior = draw_noise(NoiseSpec((_LATENTS,)), (images, _PREDICTIVE), generator(seed, "prior"))
    found: dict[str, Tensor] = {"prior": _scores(data, prior)}
    spread = {"prior": 1.0}
    for method in METHODS:
        family, _ = fitted(data, method, seed, steps)
        noise = draw_noise(family.noise_spec, (images, _PREDICTIVE), generator(seed, "predictive"))
        with torch.no_grad():
            z = family(noise).z
        found[method], spread[method] = _scores(data, z), float(z.std(-2).mean())
        if method == "mean field, KL":
            exact, least = _exact(data, z.mean(-2), z.std(-2), seed)
            found["exact"], spread["exact"] = exact, math.nan
    order = ["prior", "exact", *METHODS]
    return [
        {
            "method": method, "seed": seed, "score": float(found[method].mean()),
            "error": float(found[method].std()) / math.sqrt(images),
            "below_exact": float((found["exact"] - found[method]).mean()), "sd": spread[method],
            "least_sample_size": least if method == "exact" else math.nan,
        }
        for method in order
    ]  # fmt: skip
