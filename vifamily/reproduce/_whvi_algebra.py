"""What Walsh-Hadamard weights are: products without matrices, covariances of low rank, noise, sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vifamily.numerics.walsh_hadamard import walsh_covariance, walsh_matrix, walsh_product
from vifamily.reproduce._report import Claim, Options
from vifamily.reproduce._whvi_fits import dense_net
from vifamily.rng import generator, scoped
from vifamily.weights import NetworkWeights, convert

__all__ = ["algebra", "noise", "parameters"]

_WIDTH = 128


def algebra(options: Options) -> list[Claim]:
    """Product against matrix, and the rank of the covariance of the weights."""
    options.say("products and covariances")
    source = generator(options.seed, "whvi/algebra")
    a, g, b, x = torch.randn(4, 512, generator=source, dtype=torch.float64).unbind()
    wanted = walsh_matrix(a, g, b) @ x
    off = float((walsh_product(x, a, g, b) - wanted).abs().max() / wanted.abs().max())
    covariance = walsh_covariance(a[:8], g[:8].exp(), b[:8]).reshape(64, 64)
    rank = int(torch.linalg.matrix_rank(covariance, hermitian=True))
    return [
        Claim(
            "Products with the weights take O(D log D) and no matrix", "stated", off, None, off < 1e-12,
            "largest relative difference from the product with the matrix at D = 512, below 1e-12",
        ),
        Claim(
            "D random numbers make D^2 dependent weights", "stated", f"rank {rank} of 64 at D = 8", None, rank == 8,
            "rank of the covariance of the weights equal to D",
        ),
    ]  # fmt: skip


def noise(options: Options) -> list[Claim]:
    """Variance of the gradient with a draw for each datum, beside one draw for all; in a layer and a convolution."""
    options.say("noise for each datum")
    source = generator(options.seed, "whvi/noise")
    with scoped(source):
        dense = convert(nn.Linear(_WIDTH, _WIDTH, bias=False).double(), "walsh_hadamard", seed=options.seed)
    x, y = torch.randn(2, 64, _WIDTH, generator=source, dtype=torch.float64).unbind()
    count = 100 if options.quick else 400
    ratio = _variance_ratio(dense, x, y, count, source)
    with scoped(source):
        filters = nn.Conv2d(16, 32, 3, padding=1, bias=False).double()
    images = torch.randn(64, 16, 4, 4, generator=source, dtype=torch.float64)
    targets = torch.randn(64, 32, 4, 4, generator=source, dtype=torch.float64)
    ratios = {
        layout: _variance_ratio(
            convert(filters, f"walsh_hadamard(layout={layout})", seed=options.seed), images, targets, count, source
        )
        for layout in ("stack", "taps")
    }
    return [
        Claim(
            "Local reparameterisation lowers the variance of gradients", "stated", f"{ratio:.1f} times lower", None,
            ratio > 4,
            "one layer of 128, 64 data, a draw for each; more than four times. One draw for all is sampling of weights",
        ),
        Claim(
            "Beyond the paper: the same in a convolution, each image with kernels of its own", None,
            "; ".join(f"{layout} {found:.1f} times lower" for layout, found in ratios.items()), None,
            min(ratios.values()) > 2, "16 to 32 channels, 64 images of 4 by 4; more than twice",
        ),
    ]  # fmt: skip


def _variance_ratio(layer: NetworkWeights, x: Tensor, y: Tensor, count: int, source: torch.Generator) -> float:
    """Mean variance of a squared loss's gradient in the means, with one draw for all over one for each datum."""
    layer.settle(x)
    mean = layer.initial(source)[0].requires_grad_()
    spread = {}
    for each in (False, True):
        shape = (1, len(x), layer.dim) if each else (1, layer.dim)
        found = []
        for _ in range(count):
            z = mean + 0.1 * torch.randn(shape, generator=source, dtype=torch.float64)
            found.append(torch.autograd.grad((torch.relu(layer(x, z)) - y).square().mean(), mean)[0])
        spread[each] = float(torch.stack(found).var(0).mean())
    return spread[False] / spread[True]


def parameters() -> Claim:
    """Parameters of a network with two hidden layers."""
    report = convert(dense_net([1, _WIDTH, _WIDTH, 1], nn.ReLU, 0), "walsh_hadamard(bias=gaussian)").report
    numbers = 2 * report.latent + report.point
    dense = 2 * report.parameters
    return Claim(
        "A network 1-128-128-1 takes few parameters", "1541", numbers, None, numbers < dense / 10,
        f"less than a tenth of the {dense} of mean field; the paper's thin layers are laid out otherwise",
    )  # fmt: skip
