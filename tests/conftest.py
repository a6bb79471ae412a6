"""What every test gets: unchanged globals, explicit seeds, options and markers."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

FIXED_SEED = 20_240_117
ROOT = Path(__file__).resolve().parents[1]


# --- options ---


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vifamily")
    group.addoption("--shake", action="store_true", help="draw a fresh seed for the `seed` fixture, and print it")
    group.addoption("--shake-seed", type=int, default=None, metavar="N", help="repeat a run of --shake")
    group.addoption("--slow", action="store_true", help="run the tests marked slow")
    group.addoption("--benchmark", action="store_true", help="run the tests marked benchmark")


def pytest_configure(config: pytest.Config) -> None:
    # Decided here, once: pytest-xdist hands the options to its workers after this, so all of them share the seed.
    if config.option.shake and config.option.shake_seed is None:
        config.option.shake_seed = secrets.randbelow(2**31)
    # A failure found by chance must be found again: examples are derived from the test, unless shaken.
    hypothesis.settings.register_profile(
        "vifamily", deadline=None, derandomize=config.option.shake_seed is None, database=None, print_blob=True
    )
    hypothesis.settings.load_profile("vifamily")


def pytest_report_header(config: pytest.Config) -> str:
    shaken = config.option.shake_seed
    return f"seed: {FIXED_SEED} (fixed)" if shaken is None else f"seed: {shaken} (repeat with --shake-seed={shaken})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.option.markexpr
    for item in items:
        for name in ("slow", "benchmark"):
            if item.get_closest_marker(name) and not getattr(config.option, name) and name not in chosen:
                item.add_marker(pytest.mark.skip(reason=f"marked {name}; run it with --{name}"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))


# --- explicit randomness and data ---


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of a Monte-Carlo check: fixed, or fresh under --shake."""
    shaken = request.config.option.shake_seed
    return FIXED_SEED if shaken is None else int(shaken)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A CPU generator seeded with `seed`."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of reference data, or a skip that says where it was looked for."""
    given = os.environ.get("VIFAMILY_REFERENCE_DATA")
    folder = Path(given) if given else ROOT.parent / "shared"
    if not (folder / "posteriordb").is_dir():
        pytest.skip(f"no reference data: {folder} has no posteriordb folder (set VIFAMILY_REFERENCE_DATA)")
    return folder


# --- the guard: what a process shares, a test leaves as it was ---


def read_globals() -> dict[str, Any]:
    """Everything process-wide that the package promises not to touch."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's distribution validation": torch.distributions.Distribution._validate_args,
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "torch's random state": torch.get_rng_state(),
        "NumPy's random state": (name, keys.tobytes(), position, has_gauss, cached),
    }


def changed_globals(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of the entries that differ."""

    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [name for name in before if not equal(before[name], after[name])]


def restore_globals(state: dict[str, Any]) -> None:
    """Put `read_globals()` back, so that one bad test does not spoil the next."""
    torch.set_default_dtype(state["torch's default dtype"])
    if torch.get_default_device() != state["torch's default device"]:
        torch.set_default_device(state["torch's default device"])
    torch.set_num_threads(state["torch's number of threads"])
    torch.set_grad_enabled(state["torch's gradient mode"])
    torch.distributions.Distribution.set_default_validate_args(state["torch's distribution validation"])
    torch.use_deterministic_algorithms(state["torch's deterministic mode"])
    torch.set_rng_state(state["torch's random state"])
    name, keys, position, has_gauss, cached = state["NumPy's random state"]
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))


@pytest.fixture(autouse=True)
def guard_globals(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves the globals of torch or NumPy changed, and put them back."""
    before = read_globals()
    yield
    changed = changed_globals(before, read_globals())
    if changed:
        restore_globals(before)
        pytest.fail(
            f"{request.node.nodeid} changed {', '.join(changed)}; draw from an explicit torch.Generator, "
            "or wrap code that takes none in vifamily.rng.scoped",
            pytrace=False,
        )
