"""The empirical tangent kernel by three routes: Jacobians, layer by layer, and products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import jacrev, vjp, vmap
from torch.utils.hooks import RemovableHandle

from vifamily.errors import ConfigError, IncompatibleError, ShapeError
from vifamily.ntk._network import check_inputs, outputs_of, pushed, trainable
from vifamily.numerics.lanczos import Eigenpair, lanczos
from vifamily.rng import generator

__all__ = ["jacobian_gram", "largest_eigenvalue", "layerwise_gram", "ntk_product"]


def jacobian_gram(
    model: nn.Module,
    x: Tensor,
    other: Tensor | None = None,
    *,
    chunk: int | None = None,
    output_chunk: int | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> Tensor:
    r"""Gram matrix of the empirical tangent kernel of any module, by its Jacobians.

    .. math:: K_{(i,a),(j,b)} = \sum_p \frac{\partial f_a(x_i)}{\partial \phi_p}
              \frac{\partial f_b(x'_j)}{\partial \phi_p}

    One parameter tensor is differentiated and contracted at a time. With ``N`` inputs on each side, ``q`` outputs,
    ``P`` parameters, the largest tensor of ``P_l`` and a forward pass at cost ``F``, time is of order
    ``N q F L + N^2 q^2 P`` for ``L`` tensors, memory ``N q P_l``. With ``chunk`` inputs at a time memory is
    ``2 chunk q P_l``, and Jacobians are computed ``N / (2 chunk)`` times over; with ``output_chunk`` outputs at a time
    it is that in the place of ``q``, and passes are repeated for each part of the outputs.

    With ``scales`` each parameter's term is multiplied by its own factor: the kernel of preconditioned gradient flow,
    :math:`J D^{-1} J^\top`, such as that of :func:`adam_scales`.

    Args:
        model: The network; takes ``(inputs, ...)`` and gives ``(inputs, outputs)``.
        x: Inputs ``(N, ...)``.
        other: Inputs of the columns ``(M, ...)``; by default `x`.
        chunk: Inputs whose Jacobians are held at once; by default all.
        output_chunk: Outputs whose Jacobians are held at once; by default all.
        scales: Name of each trainable parameter to factors of its shape; by default one.

    Returns:
        ``(N q, M q)``, inputs first: ``reshape(N, q, M, q)`` has the blocks.

    Raises:
        ConfigError: If nothing is trainable, a layer is random or mixes inputs (in training mode), `chunk` or
            `output_chunk` is no positive integer, or `scales` do not belong to the parameters.
        ShapeError: If inputs or outputs have another shape.
        DeviceError: If inputs and parameters differ in device or dtype.

    Source: Jacot, Gabriel and Hongler (2018), "Neural tangent kernel"; Novak, Sohl-Dickstein and Schoenholz (2022).

    Example:
        >>> net = nn.Linear(2, 1, dtype=torch.float64)
        >>> jacobian_gram(net, torch.eye(2, dtype=torch.float64))  # x . x' + 1
        tensor([[2., 1.],
                [1., 2.]], dtype=torch.float64)
    """
    columns, parameters = x if other is None else other, trainable(model)
    check_inputs(parameters, x, columns)
    factors = _checked_scales(parameters, scales)
    with torch.no_grad():
        width = outputs_of(model, {}, x[:1]).shape[1]
    left, right = (
        jacobian_pieces(len(x), width, chunk, output_chunk),
        jacobian_pieces(len(columns), width, chunk, output_chunk),
    )
    gram = x.new_zeros(len(x), width, len(columns), width, dtype=next(iter(parameters.values())).dtype)
    for name in parameters:
        for i, rows in enumerate(left):
            jacobian = jacobian_of(model, parameters, name, x, *rows)
            # without `other` the matrix is symmetric: the blocks below the diagonal are copied
            for j in range(i if other is None else 0, len(right)):
                same = other is None and i == j
                second = jacobian if same else jacobian_of(model, parameters, name, columns, *right[j])
                if name in factors:
                    second = second * factors[name].reshape(-1)
                (at, of), (to, by) = rows, right[j]
                target = gram[at, of, to, by]
                target += (jacobian @ second.T).reshape(target.shape)
    if other is None:
        for i, (at, of) in enumerate(left):
            for to, by in right[:i]:
                gram[at, of, to, by] = gram[to, by, at, of].permute(2, 3, 0, 1)
    return gram.reshape(len(x) * width, len(columns) * width)


def ntk_product(
    model: nn.Module,
    x: Tensor,
    vector: Tensor,
    other: Tensor | None = None,
    *,
    chunk: int | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> Tensor:
    r"""Product of the tangent kernel with a vector, without the kernel: a vector-Jacobian product, then its reverse.

    .. math:: (K v)_{i} = J(x_i) \sum_j J(x'_j)^\top v_j

    Costs about five forward passes over the inputs, and the memory of a backward pass over one chunk.

    Args:
        model: The network; takes ``(inputs, ...)`` and gives ``(inputs, outputs)``.
        x: Inputs of the rows ``(N, ...)``.
        vector: ``(M, outputs)``.
        other: Inputs of the columns ``(M, ...)``; by default `x`.
        chunk: Inputs that are passed at once; by default all.
        scales: As :func:`jacobian_gram`.

    Returns:
        ``(N, outputs)``.

    Raises:
        ConfigError: As :func:`jacobian_gram`.
        ShapeError: If `vector` is not of the shape of the outputs at the columns, or as :func:`jacobian_gram`.
        DeviceError: If inputs and parameters differ in device or dtype.

    Source: Novak, Sohl-Dickstein and Schoenholz (2022), "Fast finite width neural tangent kernel".

    Example:
        >>> net = nn.Linear(2, 1, dtype=torch.float64)
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> ntk_product(net, x, torch.tensor([[1.0], [0.0]], dtype=torch.float64)).flatten()
        tensor([2., 1.], dtype=torch.float64)
    """
    columns, parameters = x if other is None else other, trainable(model)
    check_inputs(parameters, x, columns)
    factors = _checked_scales(parameters, scales)
    if vector.ndim != 2 or vector.shape[0] != columns.shape[0]:
        raise ShapeError(
            f"the vector must have shape (inputs, outputs) with {columns.shape[0]} inputs, got {tuple(vector.shape)}."
        )
    tangent = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for inputs, part in zip(_chunks(columns, chunk), _chunks(vector, chunk), strict=True):
        out, pull = _pulled_back(model, parameters, inputs)
        if out.shape != part.shape:
            raise ShapeError(f"the vector has {part.shape[1]} columns and the network {out.shape[1]} outputs.")
        (pulled,) = pull(part)
        tangent = {name: tangent[name] + pulled[name].detach() for name in parameters}
    tangent = {name: value * factors[name] if name in factors else value for name, value in tangent.items()}

    def product(rows: Tensor) -> Tensor:
        return pushed(lambda p: outputs_of(model, p, rows), parameters, tangent)[1].detach()

    return torch.cat([product(rows) for rows in _chunks(x, chunk)])


def largest_eigenvalue(
    model: nn.Module,
    x: Tensor,
    *,
    chunk: int | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> Eigenpair:
    r"""Largest eigenvalue of the Gram matrix of the tangent kernel with its vector, from products alone.

    By Lanczos' method: one :func:`ntk_product` a step, and ``N q`` numbers kept for each. Gradient descent on half
    the mean squared error is stable up to a step size of ``2 N`` over the eigenvalue.

    Args:
        model: The network; takes ``(inputs, ...)`` and gives ``(inputs, outputs)``.
        x: Inputs ``(N, ...)``.
        chunk: Inputs that are passed at once; by default all.
        max_steps: Products at most; beyond, the value is a lower bound.
        tolerance: Residual at which to stop, relative to the eigenvalue.
        seed: Seed of the first vector.

    Returns:
        Value, vector ``(N q,)`` of length one, residual, and products taken.

    Raises:
        ConfigError: As :func:`jacobian_gram`, or if `max_steps` is not positive.
        ShapeError: As :func:`jacobian_gram`.
        DeviceError: If inputs and parameters differ in device or dtype.

    Source: Lanczos (1950); Golub and Van Loan (2013), chapter 10.

    Example:
        >>> net = nn.Linear(2, 1, dtype=torch.float64)
        >>> round(largest_eigenvalue(net, torch.eye(2, dtype=torch.float64)).value, 10)  # of [[2, 1], [1, 2]]
        3.0
    """
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ConfigError(f"max_steps must be a positive integer, got {max_steps!r}.")
    check_inputs(trainable(model), x)
    with torch.no_grad():
        out = torch.cat([outputs_of(model, {}, part) for part in _chunks(x, chunk)])
    noise = torch.randn(out.numel(), generator=generator(seed, "ntk/lanczos"), dtype=torch.float64)

    def product(v: Tensor) -> Tensor:
        return ntk_product(model, x, v.reshape(out.shape), chunk=chunk).reshape(-1)

    return lanczos(product, noise.to(out), max_steps=min(max_steps, out.numel()), tolerance=tolerance)


def layerwise_gram(model: nn.Module, x: Tensor) -> Tensor:
    r"""Gram matrix of the tangent kernel of a dense network, layer by layer: the Jacobian is never formed.

    .. math:: K_{(i,a),(j,b)} = \sum_l \big(\langle h^l_i, h^l_j\rangle + 1[\text{bias}]\big)
              \langle \delta^l_{ia}, \delta^l_{jb}\rangle

    with ``h`` the input of a dense layer and ``delta`` the derivatives of the outputs by what it gives. With ``N``
    inputs and ``q`` outputs, time is of order ``N^2 q^2`` times the sum of the widths, memory ``N q`` times that sum:
    neither holds the number of parameters.

    Args:
        model: A network whose trainable parameters all belong to ``nn.Linear`` layers, each called once on
            ``(inputs, features)``, with anything between them that treats inputs one by one.
        x: Inputs ``(N, ...)``.

    Returns:
        ``(N q, N q)``, as :func:`jacobian_gram`.

    Raises:
        IncompatibleError: If parameters lie outside such layers or are shared, or a layer is called more than once or
            on another shape.
        ConfigError: As :func:`jacobian_gram`.
        ShapeError: As :func:`jacobian_gram`.
        DeviceError: If inputs and parameters differ in device or dtype.

    Source: Novak, Sohl-Dickstein and Schoenholz (2022), "Fast finite width neural tangent kernel", structured
    derivatives.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> torch.allclose(layerwise_gram(net, x), jacobian_gram(net, x), rtol=0, atol=1e-12)
        True
    """
    check_inputs(trainable(model), x)
    layers = _dense_layers(model)
    out, seen = _passed(model, layers, x)
    size, width = out.shape
    picks = torch.eye(width, dtype=out.dtype, device=out.device).unsqueeze(1).expand(width, size, width)
    slopes: Sequence[Tensor | None] = torch.autograd.grad(
        out, [made for _, made in seen.values()], picks, is_grads_batched=True, allow_unused=True
    )
    gram = out.new_zeros(size, width, size, width)
    for (name, (inputs, _)), slope in zip(seen.items(), slopes, strict=True):
        if slope is None:  # called, and without part in the outputs
            continue
        layer = layers[name]
        factor = inputs @ inputs.T if layer.weight.requires_grad else out.new_zeros(size, size)
        if layer.bias is not None and layer.bias.requires_grad:
            factor = factor + 1.0
        delta = slope.transpose(0, 1).reshape(size * width, -1)
        gram += (delta @ delta.T).reshape(size, width, size, width) * factor[:, None, :, None]
    return gram.reshape(size * width, size * width).detach()


def _chunks(x: Tensor, chunk: int | None) -> tuple[Tensor, ...]:
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ConfigError(f"chunk must be a positive number of inputs, or None for all at once, got {chunk!r}.")
    parts: tuple[Tensor, ...] = x.split(chunk or x.shape[0])
    return parts


def jacobian_pieces(size: int, width: int, chunk: int | None, output_chunk: int | None) -> list[tuple[slice, slice]]:
    """Inputs and outputs whose Jacobians are held at once."""
    for name, value, unit in (("chunk", chunk, "inputs"), ("output_chunk", output_chunk, "outputs")):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be a positive number of {unit}, or None for all at once, got {value!r}.")
    step, part = chunk or size, output_chunk or width
    return [
        (slice(i, min(i + step, size)), slice(a, min(a + part, width)))
        for i in range(0, size, step)
        for a in range(0, width, part)
    ]


def _checked_scales(parameters: dict[str, Tensor], scales: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Factors by parameter, none where all are one.

    Raises:
        ConfigError: If they do not belong to the parameters, or are not positive and finite.
    """
    if scales is None:
        return {}
    if set(scales) != set(parameters):
        odd = sorted(set(scales) ^ set(parameters))
        raise ConfigError(f"scales must name each trainable parameter and no other; they differ in {', '.join(odd)}.")
    for name, value in parameters.items():
        given = scales[name]
        if given.shape != value.shape or not bool((given > 0).all() and given.isfinite().all()):
            raise ConfigError(f"the scales of {name!r} must be positive, finite and of shape {tuple(value.shape)}.")
    return {name: scales[name].detach().to(value) for name, value in parameters.items()}


def jacobian_of(
    model: nn.Module, parameters: dict[str, Tensor], name: str, x: Tensor, rows: slice, outputs: slice
) -> Tensor:
    """Jacobian of some outputs at some inputs by one parameter tensor, ``(inputs * outputs, numbers)``."""

    def one(value: Tensor, item: Tensor) -> Tensor:
        return outputs_of(model, {**parameters, name: value}, item.unsqueeze(0)).squeeze(0)[outputs]

    found = vmap(jacrev(one), in_dims=(None, 0))(parameters[name], x[rows])
    matrix: Tensor = found.reshape(found.shape[0] * found.shape[1], -1).detach()
    return matrix


def _pulled_back(
    model: nn.Module, parameters: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[dict[str, Tensor]]]]:
    """Outputs, and the map from their cotangents to those of the parameters."""
    out, pull = vjp(lambda p: outputs_of(model, p, x), parameters)[:2]
    return out, pull


def _passed(
    model: nn.Module, layers: dict[str, nn.Linear], x: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Outputs, and what goes into and comes out of each layer that is called, each once.

    Raises:
        IncompatibleError: If none is called, or one more than once or on another shape than ``(inputs, features)``.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str) -> RemovableHandle:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            seen.setdefault(name, []).append((inputs[0].detach(), out))

        return layers[name].register_forward_hook(record)

    handles = [hook(name) for name in layers]
    try:
        with torch.enable_grad():
            out = outputs_of(model, {}, x)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise _not_dense("none of its layers is called")
    for name, calls in seen.items():
        inputs, made = calls[0]
        if len(calls) > 1 or inputs.ndim != 2 or inputs.shape[0] != x.shape[0] or not made.requires_grad:
            raise _not_dense(f"layer {name!r} is not called once on (inputs, features)")
    return out, {name: calls[0] for name, calls in seen.items()}


def _dense_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Dense layers by name; every trainable parameter belongs to exactly one."""
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    owned = [id(p) for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    if outside:
        raise _not_dense(f"parameter {outside[0]!r} does not belong to an nn.Linear layer")
    if len(set(owned)) < len(owned):
        raise _not_dense("two layers share a parameter")
    return {name: layer for name, layer in layers.items() if any(p.requires_grad for p in layer.parameters())}


def _not_dense(what: str) -> IncompatibleError:
    return IncompatibleError(f"layerwise_gram needs a dense network, but {what}. Use jacobian_gram, for any network.")
