"""Streams of randomness: independent, addressed, and nobody else's."""

import random

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from vifamily.errors import ConfigError
from vifamily.rng import (
    BLOCK,
    LARGEST_SOBOL,
    NoiseStream,
    check_seed,
    draw_noise,
    generator,
    scoped,
    scrambled_sobol,
    split,
)
from vifamily.types import NoiseSpec

# --- addresses ---


@given(
    st.integers(0, 2**63 - 1),
    st.sampled_from(["noise", "start", "start/prior"]),
    st.lists(st.integers(0, 10**6), max_size=3),
)
def test_a_seed_is_a_function_of_its_address(seed, name, index):
    first = split(seed, name, *index)
    assert first == split(seed, name, *index)
    assert 0 <= first < 2**63
    assert first != split((seed + 1) % 2**63, name, *index)
    assert first != split(seed, name + "s", *index)
    assert first != split(seed, name, *index, 0)


def test_no_two_addresses_share_a_seed():
    names = ("noise", "batches", "start", "family", "monitor")
    addresses = [(s, n, r, b) for s in range(5) for n in names for r in range(20) for b in range(20)]
    assert len({split(*a) for a in addresses}) == len(addresses)
    # concatenation does not confuse them: 1/23 is not 12/3, and a negative index is not a name
    assert split(1, "a", 2, 3) != split(1, "a", 23)
    assert split(12, "a", 3) != split(1, "a", 23)


@pytest.mark.parametrize("name", ["noise/1", "1/noise", "3", "a/-2/b"])
def test_a_name_that_an_index_could_be_taken_for_is_refused(name):
    with pytest.raises(ConfigError, match="no part that is a number"):
        split(0, name)


def test_an_index_must_be_an_integer():
    with pytest.raises(TypeError):
        split(0, "noise", 1.5)


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.0, "0", None])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ConfigError, match="seed must be an integer in"):
        check_seed(seed)


def test_numpy_integers_are_seeds():
    assert check_seed(np.int64(5)) == 5
    assert type(check_seed(np.int64(5))) is int


def test_streams_are_uncorrelated():
    rows = torch.stack([torch.randn(20_000, generator=generator(s, n, r), dtype=torch.float64)
                        for s in (0, 1) for n in ("noise", "start") for r in (0, 1)])  # fmt: skip
    off = np.corrcoef(rows.numpy()) - np.eye(len(rows))
    assert np.abs(off).max() < 5 / np.sqrt(20_000)


# --- the noise of a step ---


def stream(**options):
    options = {"draws": 3, **options}
    return NoiseStream(options.pop("seed", 11), options.pop("spec", NoiseSpec((2,))), **options)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_the_noise_of_a_step_does_not_depend_on_the_order_of_asking(balanced, law):
    one = stream(balanced=balanced, spec=NoiseSpec((2,), law))
    in_order = [one.at(t).clone() for t in range(2 * BLOCK + 3)]
    other = stream(balanced=balanced, spec=NoiseSpec((2,), law))
    for t in (2 * BLOCK + 2, 0, BLOCK, BLOCK - 1, 5):  # as a resumed fit, or one that runs steps in groups, would
        assert torch.equal(other.at(t), in_order[t])
    assert len({float(x[0, 0]) for x in in_order}) == len(in_order)


@pytest.mark.parametrize("balanced", [False, True])
def test_restarts_beside_it_do_not_change_the_noise_of_a_restart(balanced):
    together = stream(restarts=3, balanced=balanced)
    for r in range(3):
        alone = stream(first_restart=r, balanced=balanced)
        for t in (0, 1, BLOCK + 1):
            assert together.at(t).shape == (3, 3, 2)
            assert torch.equal(together.at(t)[r], alone.at(t))
    pair = stream(restarts=2, first_restart=1, balanced=balanced)
    assert torch.equal(pair.at(4), together.at(4)[1:])


def test_shapes_and_precision():
    assert stream(batch_shape=(4,), spec=NoiseSpec((2, 5))).at(0).shape == (3, 4, 2, 5)
    assert stream(spec=NoiseSpec((0,))).at(0).shape == (3, 0)
    assert stream(spec=NoiseSpec((0,)), balanced=True).at(0).shape == (3, 0)
    for balanced in (False, True):
        single, double = stream(dtype=torch.float32, balanced=balanced).at(0), stream(balanced=balanced).at(0)
        assert single.dtype == torch.float32
        assert torch.equal(single, double.float())  # the same noise, rounded


def test_names_and_seeds_part_streams():
    assert not torch.equal(stream().at(0), stream(name="other").at(0))
    assert not torch.equal(stream().at(0), stream(seed=12).at(0))


def test_noise_too_large_for_a_sobol_sequence_is_independent():
    spec = NoiseSpec((LARGEST_SOBOL + 1,))
    large = stream(spec=spec, balanced=True)
    assert not large.balanced
    assert torch.equal(large.at(3), stream(spec=spec).at(3))


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_each_number_of_the_balanced_stream_has_its_law(law):
    over_seeds = [stream(seed=s, spec=NoiseSpec((2,), law), draws=2, balanced=True).block(0) for s in range(250)]
    for step, draw, column in ((0, 0, 0), (0, 1, 1), (17, 1, 0)):
        numbers = np.array([float(block[step, draw, column]) for block in over_seeds])
        assert scipy.stats.kstest(numbers, "norm" if law == "normal" else "uniform").pvalue > 1e-5


@pytest.mark.parametrize(
    ("function", "exact"),
    [(lambda x: x[..., 0], 0.0), (lambda x: x[..., 0] * x[..., 1], 0.0), (lambda x: x[..., 0] ** 2, 1.0),
     (lambda x: torch.exp(x.sum(-1)), np.e)],
)  # fmt: skip
def test_averages_over_the_balanced_stream_are_unbiased_and_less_noisy(function, exact):
    def averages(balanced):
        return np.array(
            [float(function(stream(seed=s, draws=4, balanced=balanced).block(0)).mean()) for s in range(150)]
        )

    balanced, plain = averages(True), averages(False)
    assert abs(balanced.mean() - exact) < 5 * balanced.std(ddof=1) / np.sqrt(len(balanced))
    assert balanced.std() < 0.5 * plain.std()


def test_balanced_noise_is_finite():
    noise = torch.stack([stream(seed=s, draws=64, spec=NoiseSpec((50,)), balanced=True).block(0) for s in range(3)])
    assert bool(torch.isfinite(noise).all())
    # half a cell of the engine's resolution bounds the quantile
    assert float(noise.abs().max()) < 6.3


def test_draw_noise_has_the_asked_law():
    source = generator(0, "test")
    normal = draw_noise(NoiseSpec((5,)), (2000,), source)
    uniform = draw_noise(NoiseSpec((5,), "uniform"), (2000,), source)
    assert normal.shape == (2000, 5)
    assert scipy.stats.kstest(normal.numpy().ravel(), "norm").pvalue > 1e-5
    assert scipy.stats.kstest(uniform.numpy().ravel(), "uniform").pvalue > 1e-5


# --- the one place that touches global state ---


def everything():
    return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()


def foreign():
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_streams_leave_the_global_state_alone():
    before = everything()
    stream(balanced=True).at(0)
    stream(restarts=2).at(70)
    draw_noise(NoiseSpec((2,)), (3,), generator(0, "a"))
    assert everything() == before


def test_scoped_gives_the_same_numbers_and_restores_everything():
    before = everything()
    with scoped(7):
        first = foreign()
    assert everything() == before
    with scoped(7):
        assert foreign() == first
    with scoped(8):
        assert foreign() != first
    assert everything() == before


def test_scoped_restores_after_an_error_and_when_nested():
    before = everything()
    with pytest.raises(ZeroDivisionError), scoped(1):
        foreign()
        raise ZeroDivisionError
    assert everything() == before
    with scoped(1):
        one = foreign()
        inside = everything()
        with scoped(2):
            foreign()
        assert everything() == inside
        after = foreign()
    with scoped(1):
        assert foreign() == one
        assert foreign() == after
    assert everything() == before


def test_consecutive_scopes_of_a_generator_differ_and_repeat():
    def two(source):
        out = []
        for _ in range(2):
            with scoped(source):
                out.append(foreign())
        return out

    first, again = two(generator(3, "user")), two(generator(3, "user"))
    assert first == again
    assert first[0] != first[1]


def test_scoped_takes_the_largest_seed_and_refuses_others():
    with scoped(2**63 - 1):
        pass
    with pytest.raises(ConfigError), scoped(-1):
        pass


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 64), (3, 100), (40, 192), (7, 1)])
def test_scrambled_points_are_those_of_the_engine(size, count):
    engines = [torch.quasirandom.SobolEngine(size, scramble=True, seed=s) for s in (5, 2**60)]
    expected = torch.cat([e.draw(count, dtype=torch.float64) for e in engines])
    assert torch.equal(scrambled_sobol([5, 2**60], size, count), expected)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("restarts", [1, 2])
def test_a_span_is_the_noise_of_its_steps(balanced, restarts):
    def stream():
        return NoiseStream(3, NoiseSpec((2,)), draws=3, restarts=restarts, balanced=balanced)

    single = stream()
    for first, count in ((0, 5), (60, 10), (37, 400), (1500, 2), (10, 1)):
        expected = torch.stack([single.at(step) for step in range(first, first + count)])
        assert torch.equal(stream().span(first, count), expected)
    going = stream()
    parts = torch.cat([going.span(0, 100), going.span(100, 1400), going.span(1500, 9)])
    assert torch.equal(parts, stream().span(0, 1509))
