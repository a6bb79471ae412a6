"""The problems of the comparison: a problem of the package, its data as arrays, and the name of its log density."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from vifamily import registry
from vifamily.errors import SpecError, UnknownNameError
from vifamily.problems import Problem
from vifamily.problems._folder import find_folder, read_folder
from vifamily.problems._regression import logistic

__all__ = ["SUITE", "Entry", "entry_named", "problem_named", "simulated_logistic"]

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One problem of the suite.

    Attributes:
        density: Name of the log density that the peers run.
        problem: Builds the package's problem.
        arrays: Gives the data as the peers see them.
    """

    density: str
    problem: Callable[[], Problem]
    arrays: Callable[[], Arrays]


def simulated_logistic(num_data: int, dim: int) -> Arrays:
    """Standard normal features, weights of size 1 / sqrt(dim), labels drawn; the same at every call.

    Example:
        >>> simulated_logistic(10, 3)["X"].shape
        (10, 3)
    """
    source = np.random.default_rng(20240601)
    x = source.standard_normal((num_data, dim))
    probability = 1 / (1 + np.exp(-x @ (source.standard_normal(dim) / np.sqrt(dim))))
    return {"X": x, "y": (source.random(num_data) < probability).astype(np.float64)}


def _logistic_problem(num_data: int, dim: int) -> Problem:
    data = simulated_logistic(num_data, dim)
    model = logistic(torch.from_numpy(data["X"]), torch.from_numpy(data["y"]))
    return Problem(f"logistic_{num_data}_{dim}", model, None, "Simulated logistic regression.")


def _logistic(num_data: int, dim: int) -> Entry:
    return Entry("logistic", lambda: _logistic_problem(num_data, dim), lambda: simulated_logistic(num_data, dim))


def _read(collection: str, name: str) -> Arrays:
    return {
        key: np.asarray(value, dtype=np.float64) for key, value in read_folder(find_folder(collection, name))[0].items()
    }  # noqa: E501


def _kidscore() -> Arrays:
    data = _read("posteriordb", "kidscore_momhsiq")
    ones = np.ones(len(data["kid_score"]))
    return {"X": np.column_stack([ones, data["mom_hs"], data["mom_iq"]]), "y": data["kid_score"]}


def _ark() -> Arrays:
    data = _read("posteriordb", "arK")
    order, y = int(data["K"]), data["y"]
    lags = [y[order - k : len(y) - k] for k in range(1, order + 1)]
    return {"X": np.column_stack([np.ones(len(y) - order), *lags]), "y": y[order:]}


def _named(name: str, density: str, arrays: Callable[[], Arrays]) -> Entry:
    return Entry(density, lambda: registry.build("problems", name), arrays)


SUITE: dict[str, Entry] = {
    "logistic_1000_25": _logistic(1000, 25),
    "eight_schools": _named(
        "posteriordb_eight_schools", "eight_schools_noncentred", lambda: _read("posteriordb", "eight_schools")
    ),
    "eight_schools_centred": _named(
        "posteriordb_eight_schools(parameterisation=centered)",
        "eight_schools_centred",
        lambda: _read("posteriordb", "eight_schools"),
    ),
    "kidscore_momhsiq": _named("kidscore_momhsiq", "kidscore", _kidscore),
    "sblrc_blr": _named("sblrc_blr", "blr", lambda: _read("posteriordb", "sblrc_blr")),
    "ark": _named("ark", "ark", _ark),
    "low_dim_gauss_mix": _named(
        "low_dim_gauss_mix", "gauss_mix", lambda: {"y": _read("posteriordb", "low_dim_gauss_mix")["y"]}
    ),
    "gp_pois_regr": _named("gp_pois_regr", "gp_poisson", lambda: _read("posteriordb", "gp_pois_regr")),
    "german_credit_logistic": _named(
        "german_credit_logistic", "logistic", lambda: _read("inference_gym", "german_credit_logistic")
    ),
    "brownian_unknown_scales": _named(
        "brownian_unknown_scales", "brownian", lambda: _read("inference_gym", "brownian_unknown_scales")
    ),
    "garch11": _named("garch11", "garch", lambda: _read("posteriordb", "garch11")),
    "lotka_volterra": _named("lotka_volterra", "lotka_volterra", lambda: _read("posteriordb", "lotka_volterra")),
    "logistic_100000_100": _logistic(100_000, 100),
}
"""Problems by name, the small ones first."""


def entry_named(name: str) -> Entry:
    """Return an entry of the suite; ``logistic_N_D`` is made for any N and D.

    Raises:
        UnknownNameError: If there is none.
    """
    if name in SUITE:
        return SUITE[name]
    parts = name.split("_")
    if len(parts) == 3 and parts[0] == "logistic" and all(p.isdigit() and 0 < int(p) < 10**8 for p in parts[1:]):
        return _logistic(int(parts[1]), int(parts[2]))
    raise UnknownNameError(f"the benchmark has no problem {name!r}: choose among {', '.join(SUITE)}.")


def problem_named(name: str) -> Problem:
    """Build a problem of the suite.

    Raises:
        UnknownNameError: If there is none.
        SpecError: If its name cannot be parsed.
        ReferenceDataError: If its data are not on this machine.
    """
    if not isinstance(name, str):
        raise SpecError(f"a problem's name is a string, got {type(name).__name__}.")
    return entry_named(name).problem()
