"""Ctrl-C: first a wish, then an interruption; and the handler is put back."""

import signal
import threading

import pytest

from vifamily.interrupts import Interrupts


def press():
    signal.raise_signal(signal.SIGINT)


def test_the_first_is_a_wish_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert not interrupts.asked
        press()
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        press()


def test_the_handler_is_put_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Interrupts():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_of_somebody_elses_is_left_alone():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        with Interrupts() as interrupts:
            press()
            press()
            assert not interrupts.asked
        assert pressed == [1, 1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_do_not_touch_handlers():
    before, inside, errors = signal.getsignal(signal.SIGINT), [], []

    def work():
        try:
            with Interrupts():
                inside.append(signal.getsignal(signal.SIGINT))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (inside, errors) == ([before], [])
