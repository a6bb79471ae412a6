"""Data that belong together in groups, and minibatches made of whole groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ConfigError, DataError
from vifamily.models._base import BatchSource
from vifamily.rng import check_seed, generator
from vifamily.types import Batch

__all__ = ["Groups"]


class Groups:
    """Which group each datum belongs to.

    Args:
        ids: One integer or text per datum; equal ones are one group. Data of a group need not be neighbours.
        num_data: Number of data.
        device: Where the data live.

    Attributes:
        number: Number of the group of each datum, ``(datum,)``, in the order of the sorted ids.
        count: Number of groups.
        names: The sorted ids.

    Raises:
        DataError: If there is not one integer or text per datum.

    Example:
        >>> groups = Groups(["b", "a", "b"], 3, torch.device("cpu"))
        >>> groups.number.tolist(), groups.count, groups.names
        ([1, 0, 1], 2, ('a', 'b'))
    """

    def __init__(self, ids: Any, num_data: int, device: torch.device) -> None:
        values = np.asarray(ids.detach().cpu() if isinstance(ids, Tensor) else ids)
        if values.dtype.kind not in "biuU" or values.ndim != 1:
            raise DataError(
                f"groups must be one integer or text per datum, got an array of {values.dtype} of shape {values.shape}."
            )
        if len(values) != num_data:
            raise DataError(f"groups must name the group of each of the {num_data} data, got {len(values)} ids.")
        found, number = np.unique(values, return_inverse=True)
        self.names: tuple[Any, ...] = tuple(found.tolist())
        self.number = torch.as_tensor(number.reshape(-1), dtype=torch.long, device=device)
        self.count = len(found)
        self.sizes = torch.bincount(self.number, minlength=self.count)

    def moved(self, device: torch.device) -> None:
        """Move the numbers to a device."""
        self.number, self.sizes = self.number.to(device), self.sizes.to(device)

    def batch(self, data: Any, index: Tensor) -> Batch:
        """Return data at some positions as a batch, with its groups where none of them is cut."""
        where = index.to(self.number.device)
        present, inside = torch.unique(self.number[where], return_inverse=True)
        whole = torch.equal(torch.bincount(inside, minlength=len(present)), self.sizes[present])
        if not whole:
            return Batch(data, len(index), index)
        return Batch(data, len(index), index, inside, len(present))

    def batches(self, batch_size: int, *, seed: int, gather: Callable[[Tensor], Any]) -> BatchSource:
        """Return a source of batches of whole groups; see :class:`WholeGroups`."""
        return WholeGroups(self, batch_size, check_seed(seed), gather)


class WholeGroups(BatchSource):
    """Epochs of shuffled batches of equally many whole groups, so that each group is as likely in a batch as another.

    A batch holds as many groups as make ``batch_size`` data on average; where groups differ in size, so do batches.
    Groups left over at the end of an epoch are in no batch of it.

    Args:
        groups: The groups.
        batch_size: Data per batch, about.
        seed: Root seed.
        gather: From positions to the data there.

    Raises:
        ConfigError: If the batch is smaller than the average group.
    """

    def __init__(self, groups: Groups, batch_size: int, seed: int, gather: Callable[[Tensor], Any]) -> None:
        num_data = len(groups.number)
        self.groups, self.seed, self.gather = groups, seed, gather
        self.per_batch = batch_size * groups.count // num_data
        if self.per_batch < 1:
            raise ConfigError(
                f"batches are made of whole groups, and a group has {num_data / groups.count:.3g} data on average: "
                f"batch_size={batch_size} holds none. Use at least batch_size={-(-num_data // groups.count)}."
            )
        self.dropped_per_epoch = (groups.count % self.per_batch) * num_data // groups.count
        order = torch.argsort(groups.number.cpu(), stable=True)
        self.rows = torch.split(order, groups.sizes.tolist())
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def at(self, step: int) -> Batch:
        """Return the batch of a step."""
        epoch, position = divmod(step, self.groups.count // self.per_batch)
        if epoch != self._epoch:
            self._order = torch.randperm(self.groups.count, generator=generator(self.seed, "batches", epoch))
            self._epoch = epoch
        chosen = self._order[position * self.per_batch : (position + 1) * self.per_batch]
        index = torch.cat([self.rows[g] for g in chosen.tolist()])
        return self.groups.batch(self.gather(index), index)
