"""Posterior draws as ArviZ's InferenceData."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from vifamily.diagnostics.summary import as_plain

__all__ = ["to_inference_data"]


def _chain(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Add the chain axis that ArviZ expects: independent draws are one chain."""
    return {name: value.detach().cpu().numpy()[None] for name, value in values.items()}


def to_inference_data(
    posterior: Mapping[str, Tensor],
    *,
    sample_stats: Mapping[str, Tensor] | None = None,
    log_likelihood: Mapping[str, Tensor] | None = None,
    posterior_predictive: Mapping[str, Tensor] | None = None,
    observed_data: Mapping[str, Tensor] | None = None,
    trace: Mapping[str, np.ndarray] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """Build an InferenceData.

    Args:
        posterior: Name to ``(draw, *shape)``.
        sample_stats: Figures per draw, ``(draw,)``.
        log_likelihood: Name to ``(draw, datum)``.
        posterior_predictive: Name to ``(draw, *shape)``.
        observed_data: Name to data without a draw axis.
        trace: Name to ``(record,)``, put into the group ``fit_trace``.
        attributes: Attributes of the posterior group; what is not text or a number is stored as JSON text.

    Returns:
        ``arviz.InferenceData`` with one chain.
    """
    import arviz
    import xarray

    groups: dict[str, Any] = {"posterior": _chain(posterior)}
    for name, values in (
        ("sample_stats", sample_stats),
        ("log_likelihood", log_likelihood),
        ("posterior_predictive", posterior_predictive),
    ):
        if values:
            groups[name] = _chain(values)
    if observed_data:
        groups["observed_data"] = {name: value.detach().cpu().numpy() for name, value in observed_data.items()}
    data = arviz.from_dict(**groups)
    plain = {
        key: value
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
        else json.dumps(as_plain(value))
        for key, value in (attributes or {}).items()
    }
    data.posterior.attrs.update(plain)
    if trace:
        dataset = xarray.Dataset({key.replace(":", "_"): ("record", np.asarray(value)) for key, value in trace.items()})
        data.add_groups({"fit_trace": dataset}, warn_on_custom_groups=False)
    return data
