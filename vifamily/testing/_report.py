"""How the kit runs contracts and says what came of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vifamily.errors import VifamilyError

__all__ = ["Broken", "ContractError", "Contracts", "NotApplicable", "Report"]


class ContractError(VifamilyError, RuntimeError):
    """An entry breaks one of the contracts of its kind.

    Attributes:
        entry: The entry.
        contract: The contract it breaks.
        got: What was found.
        expected: What the contract asks for.
    """

    def __init__(self, entry: str, contract: str, got: str, expected: str) -> None:
        super().__init__(f"{entry} breaks the contract {contract!r}: expected {expected}; got {got}.")
        self.entry, self.contract, self.got, self.expected = entry, contract, got, expected


class Broken(Exception):  # noqa: N818 - not an error of its own: it becomes a ContractError
    """Raised inside a contract that does not hold."""

    def __init__(self, *, got: str, expected: str) -> None:
        super().__init__(f"expected {expected}; got {got}")
        self.got, self.expected = got, expected


class NotApplicable(Exception):  # noqa: N818
    """Raised inside a contract that says nothing about this entry; holds the reason."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Which contracts an entry was held to.

    Attributes:
        entry: The entry.
        kind: ``"objective"``, ``"family"``, ``"model"`` or ``"solver"``.
        passed: Contracts that hold.
        skipped: Contracts that say nothing about it, each with the reason.

    Example:
        >>> print(Report("elbo", "objective", ("shapes",), {"minibatches": "needs all data"}))
        objective elbo: 1 contract holds
          passed   shapes
          skipped  minibatches: needs all data
    """

    entry: str
    kind: str
    passed: tuple[str, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        """Return one line per contract."""
        many = "contract holds" if len(self.passed) == 1 else "contracts hold"
        lines = [f"{self.kind} {self.entry}: {len(self.passed)} {many}"]
        lines += [f"  passed   {name}" for name in self.passed]
        lines += [f"  skipped  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


class Contracts:
    """Runs contracts one after the other; the first that does not hold ends it.

    Args:
        entry: The entry, for messages.
        kind: Its kind.
        skip: Contracts to leave out, with reasons.
    """

    def __init__(self, entry: str, kind: str, skip: Mapping[str, str] | None = None) -> None:
        self.entry, self.kind, self.left_out = entry, kind, dict(skip or {})
        self.passed: list[str] = []
        self.skipped: dict[str, str] = {}

    def run(self, name: str, contract: Callable[..., Any], *arguments: Any) -> None:
        """Run one contract.

        Raises:
            ContractError: If it does not hold, or an exception escapes from the entry.
        """
        if name in self.left_out:
            self.skipped[name] = self.left_out[name]
            return
        before = torch.get_rng_state()
        try:
            contract(*arguments)
        except NotApplicable as reason:
            self.skipped[name] = str(reason)
            return
        except Broken as broken:
            raise ContractError(self.entry, name, broken.got, broken.expected) from None
        except Exception as error:
            raise ContractError(self.entry, name, f"{type(error).__name__}: {error}", "no exception") from error
        finally:
            changed = not torch.equal(before, torch.get_rng_state())
            if changed:
                torch.set_rng_state(before)
        if changed:
            raise ContractError(
                self.entry, name, "a changed global random state of torch",
                "no randomness but that of the generator or the noise that is given",
            )  # fmt: skip
        self.passed.append(name)

    def report(self) -> Report:
        """Return what was run.

        Raises:
            ContractError: If a contract to leave out does not exist.
        """
        unknown = sorted(set(self.left_out) - set(self.skipped))
        if unknown:
            known = ", ".join([*self.passed, *self.skipped])
            raise ContractError(self.entry, unknown[0], "no contract of this name", f"one of {known} in skip=")
        return Report(self.entry, self.kind, tuple(self.passed), self.skipped)
