"""The guard of conftest.py must itself be able to fail."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def guard() -> ModuleType:
    specification = importlib.util.spec_from_file_location("guard_under_test", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


CHANGES: dict[str, Callable[[], object]] = {
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float16),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "torch's number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch's gradient mode": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "torch's distribution validation": lambda: torch.distributions.Distribution.set_default_validate_args(
        not torch.distributions.Distribution._validate_args
    ),
    "torch's deterministic mode": lambda: torch.use_deterministic_algorithms(True),
    "torch's random state": lambda: torch.randn(1),
    "NumPy's random state": lambda: np.random.rand(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_guard_sees_and_undoes_each_change(guard: ModuleType, name: str) -> None:
    before = guard.read_globals()
    try:
        CHANGES[name]()
        assert guard.changed_globals(before, guard.read_globals()) == [name]
    finally:
        guard.restore_globals(before)
    assert guard.changed_globals(before, guard.read_globals()) == []


def test_guard_watches_everything_it_reads(guard: ModuleType) -> None:
    assert set(guard.read_globals()) == set(CHANGES)


def test_seed_is_fixed_unless_shaken(seed: int, guard: ModuleType, request: pytest.FixtureRequest) -> None:
    shaken = request.config.option.shake_seed
    assert seed == (guard.FIXED_SEED if shaken is None else shaken)
