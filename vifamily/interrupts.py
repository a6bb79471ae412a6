"""Ctrl-C during a fit: the step in progress is finished first, so that nothing computed is lost or half written."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interrupts"]


class Interrupts:
    """Turns the first Ctrl-C into a wish that the loop reads between steps; the second one interrupts at once.

    Python's own handler raises ``KeyboardInterrupt`` anywhere, also between two halves of an update. It is replaced
    while the context is open, in the main thread only and only where nobody else has replaced it, and put back.

    Example:
        >>> with Interrupts() as interrupts:
        ...     signal.raise_signal(signal.SIGINT)
        ...     interrupts.asked
        True
    """

    def __init__(self) -> None:
        self.asked = False
        self._replaced: Any = None

    def __enter__(self) -> Self:
        """Begin listening."""
        here = threading.current_thread() is threading.main_thread()
        if here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._replaced = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the handler back."""
        if self._replaced is not None:
            signal.signal(signal.SIGINT, self._replaced)
            self._replaced = None
