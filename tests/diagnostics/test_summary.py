"""Summaries of draws."""

import math

import numpy as np
import pytest
import torch

from vifamily.diagnostics.summary import as_plain, summarise
from vifamily.errors import ConfigError, ShapeError


def test_against_numpy(generator):
    x = torch.randn(101, 2, generator=generator, dtype=torch.float64)
    found = summarise(x, ["a", "b[0]"], probabilities=(0.1, 0.5, 0.93))
    np.testing.assert_allclose(found.quantiles.numpy(), np.quantile(x.numpy(), [0.1, 0.5, 0.93], axis=0), atol=1e-12)
    np.testing.assert_allclose(found.mean.numpy(), x.numpy().mean(0), atol=1e-12)
    np.testing.assert_allclose(found.sd.numpy(), x.numpy().std(0, ddof=1), atol=1e-12)
    np.testing.assert_allclose(found.mcse.numpy(), x.numpy().std(0, ddof=1) / math.sqrt(101), atol=1e-12)
    row = found.to_dict()["b[0]"]
    assert list(row) == ["mean", "sd", "10%", "50%", "93%", "mcse"]


def test_prints_names_with_brackets(generator):
    text = str(summarise(torch.randn(10, 1, generator=generator), ["theta[0]"]))
    assert "theta[0]" in text
    assert "95%" in text
    assert "10 draws" in text


def test_bad_input():
    with pytest.raises(ShapeError, match="as many names"):
        summarise(torch.zeros(5, 2), ["a"])
    with pytest.raises(ConfigError, match="probabilities"):
        summarise(torch.zeros(5, 1), ["a"], probabilities=(1.5,))


def test_plain_data():
    assert as_plain({"a": (1.0, math.nan), 2: [math.inf]}) == {"a": [1.0, "nan"], "2": ["inf"]}
