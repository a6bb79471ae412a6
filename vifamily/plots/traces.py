"""The course of a fit, and how good its importance weights are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike
from scipy import ndimage, special

from vifamily.errors import DataError, ShapeError
from vifamily.plots import _style as style
from vifamily.plots._style import Array

__all__ = ["k_hat", "loss_trace"]


def loss_trace(
    step: ArrayLike,
    loss: ArrayLike,
    error: ArrayLike | None = None,
    *,
    step_size: ArrayLike | None = None,
    label: str = "loss",
    level: float | None = None,
    level_label: str = "minus log evidence",
    title: str | None = None,
) -> Figure:
    """Loss against step, with its Monte-Carlo error and the step size.

    The band is two standard errors of the smoothed loss on either side; dotted lines mark where the step size was
    halved or cut further. Limits come from quantiles of the settled part, so that a wild start does not flatten the
    rest.

    Args:
        step: Step numbers, ``(n,)``.
        loss: The loss there, ``(n,)``.
        error: Standard error of each loss, ``(n,)``.
        step_size: Step size there, ``(n,)``; changes are marked.
        label: What to call the loss.
        level: A known value to compare with, drawn as a line.
        level_label: What to call it.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If the arrays differ in length.
        DataError: If no loss is finite.

    Example:
        >>> import numpy as np
        >>> step = np.arange(100)
        >>> figure = loss_trace(step, np.exp(-step / 20), np.full(100, 0.1))
        >>> figure.axes[0].get_xlabel()
        'step'
    """
    steps, losses = np.asarray(step, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    errors = None if error is None else np.asarray(error, dtype=np.float64)
    sizes = None if step_size is None else np.asarray(step_size, dtype=np.float64)
    lengths = {a.shape for a in (steps, losses, errors, sizes) if a is not None}
    if len(lengths) != 1 or steps.ndim != 1:
        raise ShapeError(f"step, loss, error and step_size must be vectors of one length, got {sorted(lengths)}.")
    kept = np.isfinite(losses)
    if not kept.any():
        raise DataError("the loss trace holds no finite value, so there is nothing to draw.")
    steps, losses = steps[kept], losses[kept]
    errors = None if errors is None else np.nan_to_num(errors[kept], nan=0.0, posinf=0.0)
    figure = style.new_figure(6.4, 3.8)
    axes = figure.subplots()
    handles = _draw_loss(axes, steps, losses, errors, label)
    if sizes is not None:
        handles += _mark_step_sizes(axes, steps, sizes[kept])
    if level is not None:
        axes.axhline(level, color=style.REFERENCE, linewidth=1.4)
        handles.append(Line2D([], [], color=style.REFERENCE, linewidth=1.4, label=level_label))
    axes.set_ylim(*_loss_limits(losses, level))
    axes.set_xlim(float(steps[0]), float(max(steps[-1], steps[0] + 1)))
    axes.set_xlabel("step", fontsize=style.LABEL_SIZE, color=style.INK)
    axes.set_ylabel(label, fontsize=style.LABEL_SIZE, color=style.INK)
    style.dress(axes, ticks=6, grid=True)
    style.title(figure, title)
    style.legend(axes, handles, loc="upper right", solid=True)
    return figure


def _draw_loss(axes: Axes, steps: Array, losses: Array, errors: Array | None, label: str) -> list[Line2D]:
    width = max(1.0, losses.size / 80)
    # the raw loss of one step is mostly noise: shown faintly, with a running mean over it
    axes.plot(steps, losses, color=style.POSTERIOR, linewidth=0.6, alpha=0.3)
    if losses.size < 20:
        smooth, span = losses, 1.0
    else:
        smooth = ndimage.gaussian_filter1d(losses, width, mode="mirror")
        span = 2 * np.sqrt(np.pi) * width  # a Gaussian window averages this many values
    axes.plot(steps, smooth, color=style.POSTERIOR, linewidth=1.6)
    handles = [Line2D([], [], color=style.POSTERIOR, linewidth=1.6, label=f"{label}, running mean")]
    if errors is not None and (errors > 0).any():
        spread = ndimage.gaussian_filter1d(errors, width, mode="mirror") if losses.size >= 20 else errors
        half = 2 * spread / np.sqrt(span)
        axes.fill_between(steps, smooth - half, smooth + half, color=style.POSTERIOR, alpha=0.22, linewidth=0)
        handles.append(Line2D([], [], color=style.POSTERIOR, alpha=0.3, linewidth=7, label="two standard errors"))
    return handles


def _mark_step_sizes(axes: Axes, steps: Array, sizes: Array) -> list[Line2D]:
    cut = steps[1:][sizes[1:] < 0.75 * sizes[:-1]]
    for where in cut[:40]:
        axes.axvline(float(where), color=style.GREY, linewidth=0.9, linestyle=":")
    return [Line2D([], [], color=style.GREY, linewidth=0.9, linestyle=":", label="step size cut")] if cut.size else []


def _loss_limits(losses: Array, level: float | None) -> tuple[float, float]:
    settled = losses[losses.size // 2 :]
    low, middle, high = np.quantile(settled, [0.002, 0.5, 0.998])
    width = max(float(high - low), 1e-9 * abs(float(middle)), 1e-12)
    # the way down is shown as far as it does not flatten the end
    top = min(float(np.quantile(losses, 0.998)), float(high) + 4 * width)
    bottom = max(float(losses.min()), float(low) - width)
    if level is not None and abs(level - middle) < 20 * width:
        bottom, top = min(bottom, level), max(top, level)
    margin = 0.06 * max(top - bottom, width)
    return bottom - margin, top + margin


def k_hat(
    k: ArrayLike,
    threshold: float = 0.7,
    *,
    log_weights: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """How far importance weights can be trusted.

    With one ``k`` and the log weights it came from: the largest share of the total weight that any number of draws
    holds, against equal weights. With one ``k`` per datum (leave-one-out): each against its datum, with the thresholds.

    Args:
        k: Pareto shape, a number or ``(datum,)``.
        threshold: Above it the estimate is not reliable; ``min(1 - 1 / log10(draws), 0.7)``.
        log_weights: ``log p - log q`` of the draws, ``(draw,)``, up to a constant; only with a single ``k``.
        names: Labels of the data; their positions by default.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If log weights are given together with many ``k``, or a single ``k`` without them.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, Journal of Machine Learning
        Research 25.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> k_hat(0.3, log_weights=rng.normal(size=200)).axes[0].get_ylabel()
        'share of the total weight'
        >>> k_hat(rng.uniform(size=30)).axes[0].get_ylabel()
        'k-hat'
    """
    values = np.atleast_1d(np.asarray(k, dtype=np.float64))
    if values.ndim != 1:
        raise ShapeError(f"k must be a number or a vector, got shape {values.shape}.")
    if log_weights is not None:
        if values.size != 1:
            raise ShapeError(f"log_weights go with a single k, got {values.size} of them.")
        return _weight_shares(float(values[0]), threshold, np.asarray(log_weights, dtype=np.float64), title)
    if values.size == 1 and names is None:
        raise ShapeError("a single k needs the log weights it came from: pass log_weights=.")
    return _k_per_datum(values, threshold, names, title)


def _verdict(k: float, threshold: float) -> tuple[str, str]:
    if not np.isfinite(k):
        return f"k-hat is {k}", style.WARNING
    good = k <= threshold
    return (
        f"k-hat {k:.2f}, {'below' if good else 'above'} the threshold {threshold:.2f}",
        style.ACCENT if good else style.WARNING,
    )


def _weight_shares(k: float, threshold: float, log_weights: Array, title: str | None) -> Figure:
    finite = np.sort(log_weights[np.isfinite(log_weights)])[::-1]
    if finite.size < 2:
        raise DataError(f"at least two finite log weights are needed, got {finite.size}.")
    share = np.cumsum(np.exp(finite - special.logsumexp(finite)))
    rank = np.arange(1, finite.size + 1)
    figure = style.new_figure(5.4, 3.9)
    axes = figure.subplots()
    axes.plot(rank, rank / finite.size, color=style.GREY, linewidth=1.1, linestyle="--")
    axes.plot(rank, share, color=style.POSTERIOR, linewidth=1.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, finite.size)
    axes.set_ylim(0.6 / finite.size, 1.4)
    axes.set_xlabel("number of draws, largest weight first", fontsize=style.LABEL_SIZE, color=style.INK)
    axes.set_ylabel("share of the total weight", fontsize=style.LABEL_SIZE, color=style.INK)
    style.dress(axes, grid=True)
    text, colour = _verdict(k, threshold)
    effective = 1.0 / float(np.exp(2 * (finite - special.logsumexp(finite))).sum())
    axes.set_title(text, fontsize=style.LABEL_SIZE, color=colour, loc="left", fontweight="bold")
    handles = [
        Line2D(
            [],
            [],
            color=style.POSTERIOR,
            linewidth=1.9,
            label=f"importance weights ({effective:.0f} of {finite.size} effective)",
        ),
        Line2D([], [], color=style.GREY, linewidth=1.1, linestyle="--", label="equal weights"),
    ]
    style.legend(axes, handles, loc="lower right", solid=True)
    style.title(figure, title)
    return figure


def _k_per_datum(values: Array, threshold: float, names: Sequence[str] | None, title: str | None) -> Figure:
    figure = style.new_figure(6.4, 3.8)
    axes = figure.subplots()
    position = np.arange(values.size)
    finite = np.isfinite(values)
    over = finite & (values > threshold)
    axes.plot(
        position[finite & ~over],
        values[finite & ~over],
        "o",
        color=style.POSTERIOR,
        markersize=4.5,
        alpha=0.75,
        markeredgewidth=0,
    )
    axes.plot(position[over], values[over], "D", color=style.WARNING, markersize=5.5, markeredgewidth=0)
    axes.axhline(threshold, color=style.WARNING, linewidth=1.2, linestyle="--")
    if threshold < 1.0 and finite.any() and values[finite].max() > 0.9:
        axes.axhline(1.0, color=style.WARNING, linewidth=1.2)
    top = max(float(values[finite].max()) if finite.any() else 1.0, threshold)
    axes.set_ylim(min(float(values[finite].min()) if finite.any() else 0.0, 0.0) - 0.08, 1.12 * top + 0.05)
    axes.set_xlim(-0.5 - 0.01 * values.size, values.size - 0.5 + 0.01 * values.size)
    axes.set_ylabel("k-hat", fontsize=style.LABEL_SIZE, color=style.INK)
    axes.set_xlabel("datum", fontsize=style.LABEL_SIZE, color=style.INK)
    style.dress(axes, ticks=6, grid=True)
    if names is not None:
        labels = style.as_names(names, values.size)
        if values.size <= 24:
            axes.set_xticks(position, labels, rotation=35, ha="right", fontsize=style.TICK_SIZE)
            axes.set_xlabel("")
    text = f"{int(over.sum())} of {values.size} data above the threshold {threshold:.2f}"
    colour = style.WARNING if over.any() else style.ACCENT
    axes.set_title(text, fontsize=style.LABEL_SIZE, color=colour, loc="left", fontweight="bold")
    style.title(figure, title)
    return figure
