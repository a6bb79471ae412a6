"""Which members the rows in flight belong to, in a form that survives gradient checkpointing."""

from __future__ import annotations

import contextlib
from typing import Any

__all__ = ["Selection"]


class Selection:
    """The members that layers apply, shared by all layers of a stack.

    Rows are member-major: the first block of rows belongs to the first member chosen, and so on.

    Attributes:
        members: First member and the one after the last; None switches adapters off.
        rows: Rows per member; used where rows are repeated inside the model.

    Example:
        >>> chosen = Selection(4)
        >>> with chosen.using((1, 2), rows=8):
        ...     print(chosen.members)
        (1, 2)
        >>> chosen.members
        (0, 4)
    """

    def __init__(self, num_members: int) -> None:
        self.members: tuple[int, int] | None = (0, num_members)
        self.rows = 0

    @property
    def count(self) -> int:
        """Number of blocks of rows."""
        return 1 if self.members is None else self.members[1] - self.members[0]

    def using(self, members: tuple[int, int] | None, rows: int) -> _Using:
        """Return a context in which these members are chosen; it can be entered again."""
        return _Using(self, members, rows)

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """Contexts of a checkpointed forward pass and of its recomputation.

        A layer that is computed again in the backward pass must see the members of the forward pass, not those that
        happen to be chosen by then.
        """
        return contextlib.nullcontext(), self.using(self.members, self.rows)


class _Using:
    def __init__(self, selection: Selection, members: tuple[int, int] | None, rows: int) -> None:
        self._selection, self._wanted = selection, (members, rows)
        self._before: list[tuple[tuple[int, int] | None, int]] = []

    def __enter__(self) -> None:
        self._before.append((self._selection.members, self._selection.rows))
        self._selection.members, self._selection.rows = self._wanted

    def __exit__(self, *_: object) -> None:
        self._selection.members, self._selection.rows = self._before.pop()
