"""Fixtures of the numerical tests."""

import pytest
import torch


@pytest.fixture
def validation():
    """The compiler, when first used, switches torch's validation of distributions off."""
    kept = torch.distributions.Distribution._validate_args
    yield
    torch.distributions.Distribution.set_default_validate_args(kept)
