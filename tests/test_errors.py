"""Exceptions: each is the package's and one of Python's, can be caught as either, and survives a process boundary."""

import inspect
import pickle

import pytest

from vifamily import errors

CLASSES = [getattr(errors, name) for name in errors.__all__]
RAISED = [c for c in CLASSES if issubclass(c, Exception) and not issubclass(c, Warning)]


def make(kind):
    return kind("message", step=3, term="log_q") if kind is errors.NonFiniteLossError else kind("message")


@pytest.mark.parametrize("kind", RAISED, ids=lambda k: k.__name__)
def test_every_error_is_the_packages_own(kind):
    assert issubclass(kind, errors.VifamilyError)
    assert str(make(kind)) == "message"


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.DataError, ValueError),
        (errors.ShapeError, ValueError),
        (errors.DeviceError, ValueError),
        (errors.SupportError, ValueError),
        (errors.SpecError, ValueError),
        (errors.UnknownNameError, KeyError),
        (errors.UnknownNameError, ValueError),
        (errors.RegistryError, RuntimeError),
        (errors.IncompatibleError, TypeError),
        (errors.ModelError, RuntimeError),
        (errors.NonFiniteLossError, RuntimeError),
        (errors.NotAvailableError, RuntimeError),
        (errors.CheckpointError, ValueError),
        (errors.ReferenceDataError, FileNotFoundError),
        (errors.MissingExtraError, ImportError),
        (errors.ConvergenceWarning, UserWarning),
    ],
    ids=lambda v: v.__name__,
)
def test_errors_can_be_caught_as_pythons_own(kind, builtin):
    assert issubclass(kind, builtin)


def test_all_lists_every_class_defined_here():
    defined = {n for n, v in vars(errors).items() if inspect.isclass(v) and v.__module__ == errors.__name__}
    assert defined == set(errors.__all__)


def test_unknown_name_shows_its_message_without_quotes():
    # KeyError's own str() is the repr of its argument
    assert str(errors.UnknownNameError("no entry named 'elbow'")) == "no entry named 'elbow'"


def test_what_an_error_carries():
    mismatch = errors.IncompatibleError("no", missing=("family: log density",), works_with={"families": ["full_rank"]})
    assert mismatch.missing == ("family: log density",)
    assert mismatch.works_with == {"families": ["full_rank"]}
    assert errors.IncompatibleError("no").works_with == {}
    stopped = errors.NonFiniteLossError("stopped", step=7, term="entropy", parameter="loc")
    assert (stopped.step, stopped.term, stopped.parameter, stopped.posterior) == (7, "entropy", "loc", None)


@pytest.mark.parametrize("kind", RAISED, ids=lambda k: k.__name__)
def test_errors_cross_a_process_boundary(kind):
    # a grid runs its cells in other processes, and an error that cannot be unpickled kills the pool instead
    back = pickle.loads(pickle.dumps(make(kind)))
    assert type(back) is kind
    assert str(back) == "message"


def test_a_stopped_fit_keeps_its_place_across_a_process_boundary():
    error = errors.NonFiniteLossError("stopped", step=7, term="entropy", parameter="loc", posterior=lambda: None)
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.step, back.term, back.parameter) == ("stopped", 7, "entropy", "loc")
    assert back.posterior is None
