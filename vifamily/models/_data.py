"""Data of a model: tensors, a torch Dataset or a DataLoader, checked, and read whole or in minibatches."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from vifamily import rng
from vifamily.errors import ConfigError, DataError, DeviceError, ShapeError, VifamilyError
from vifamily.models._base import BatchSource, ShuffledIndex, WholeData
from vifamily.models._calls import check_count
from vifamily.types import Batch

__all__ = ["DataSource", "as_data", "as_numbers", "check_tensor", "data_source", "map_data", "named_parts", "take_rows"]


def map_data(function: Callable[[Any], Any], data: Any) -> Any:
    """Apply a function to every tensor of a tensor, a sequence or a mapping; a sequence becomes a tuple."""
    if isinstance(data, Mapping):
        return {key: function(value) for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        return tuple(function(value) for value in data)
    return function(data)


def named_parts(data: Any) -> dict[str, Any]:
    """Return the parts of data with a name for messages."""
    if isinstance(data, Mapping):
        return {repr(key): value for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        return {f"number {i}": value for i, value in enumerate(data)}
    return {"": data}


def take_rows(data: Any, index: Any) -> Any:
    """Select along the datum axis."""
    return map_data(lambda part: part[index], data)


def check_tensor(value: Any, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of data after checking its values, dtype and device.

    Raises:
        DataError: If it cannot be read as numbers, or holds NaN or infinite values.
        DeviceError: If it lives elsewhere, or has another floating dtype than the model.
    """
    said = f"the data {name}".rstrip()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.array(value, order="C"))
    if not isinstance(value, Tensor):
        raise DataError(f"{said} must be a tensor or a numeric array, got {type(value).__name__}.")
    if value.layout is not torch.strided or value.is_complex():
        got = value.dtype if value.is_complex() else value.layout
        raise DataError(f"{said} must be real numbers in a dense tensor, got {got}: use .to_dense(), or real parts.")
    if value.device != device:
        raise DeviceError(f"{said} live on {value.device}, the model on {device}: move one of them (device=).")
    if not value.is_floating_point():
        return value
    if value.dtype != dtype:
        raise DeviceError(
            f"{said} are {value.dtype} but the model computes in {dtype}: convert them with .to({dtype}), or give the "
            f"model that precision (pass dtype={value.dtype}; of a network, net.to({value.dtype}))."
        )
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        count, first = int((~finite).sum()), (~finite).nonzero()[0].tolist()
        raise DataError(f"{said} hold {count} NaN or infinite value(s), the first at {first}. Remove or impute them.")
    return value


def as_numbers(value: Any, what: str) -> Tensor:
    """Return numbers as a tensor.

    Args:
        value: A tensor, an array, or nested lists of numbers of one length.
        what: What they are, in the words of the message.

    Raises:
        DataError: If they are no real numbers.
    """
    try:
        # an array is copied: torch warns of shared memory that it may not write to, or whose strides are negative
        found = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what} must be numbers in a tensor, an array or lists, got {value!r:.80}: {error}."
        ) from error
    if found.is_complex():
        raise DataError(f"{what} must be real numbers, got {found.dtype}.")
    return found


def as_data(data: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, int]:
    """Check tensors with a common datum axis.

    Returns:
        The data (tensor, tuple or dict of tensors) and their length.

    Raises:
        DataError: If they are empty, disagree in length, or hold values that are not finite.
        ShapeError: If a part has no datum axis.
        DeviceError: If dtype or device are not those of the model.
    """
    parts = named_parts(data)
    if not parts:
        raise DataError("data are empty: give at least one tensor with a datum axis.")
    names = iter(parts)
    checked = map_data(lambda value: check_tensor(value, next(names), dtype, device), data)
    lengths = {}
    for name, part in named_parts(checked).items():
        if part.dim() == 0:
            raise ShapeError(f"the data {name} must have a datum axis, got a single number.")
        lengths[name] = len(part)
    if len(set(lengths.values())) > 1:
        raise DataError(f"data must agree in length, got {', '.join(f'{n}: {k}' for n, k in lengths.items())}.")
    size = next(iter(lengths.values()))
    if size == 0:
        raise DataError("data are empty: the datum axis has length 0.")
    return checked, size


class DataSource(abc.ABC):
    """Where a model's data come from.

    Attributes:
        num_data: Size of the whole data set.
    """

    num_data: int

    own_batch_size: int | None = None
    """Size of the batches in which the data come, where they cannot be had at once."""
    check: Callable[[Any], None] | None = None
    """What a model asks of data that it has not seen; called with what a dataset or loader gives, as it comes."""

    def _seen(self, arrived: tuple[Any, int]) -> tuple[Any, int]:
        if self.check is not None:
            self.check(arrived[0])
        return arrived

    @abc.abstractmethod
    def whole(self) -> Any:
        """Return all data."""

    @abc.abstractmethod
    def sample(self) -> Any:
        """Return a few data, for a first look."""

    @abc.abstractmethod
    def rows(self, index: Tensor) -> Any:
        """Return the data at some positions."""

    @abc.abstractmethod
    def moved(self, dtype: torch.dtype, device: torch.device) -> None:
        """Give data from now on in another dtype, on another device."""

    def batches(self, batch_size: int | None, *, seed: int) -> BatchSource:
        """Return the source of minibatches; None means all data at every step."""
        if batch_size is None:
            return WholeData()
        if check_count(batch_size, "batch_size") > self.num_data:
            raise ConfigError(f"batch_size must not exceed the {self.num_data} data, got {batch_size}.")
        return ShuffledIndex(self.num_data, batch_size, rng.check_seed(seed), self.rows)


class _Tensors(DataSource):
    def __init__(self, data: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._data, self.num_data = as_data(data, dtype, device)

    def moved(self, dtype: torch.dtype, device: torch.device) -> None:
        def move(part: Tensor) -> Tensor:
            return part.to(device, dtype) if part.is_floating_point() else part.to(device)

        self._data = map_data(move, self._data)

    def whole(self) -> Any:
        return self._data

    def sample(self) -> Any:
        return take_rows(self._data, slice(4))

    def rows(self, index: Tensor) -> Any:
        return take_rows(self._data, index)


class _Items(DataSource):
    """A map-style dataset: items are read, collated, checked and moved when asked for."""

    def __init__(self, dataset: Dataset[Any], dtype: torch.dtype, device: torch.device) -> None:
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise DataError(
                "a dataset without len() cannot be read by position: give a DataLoader of it and num_data=."
            )
        self.num_data = len(dataset)
        if self.num_data == 0:
            raise DataError("the dataset is empty.")
        self._dataset: Any = dataset
        self._dtype, self._device = dtype, device
        self._whole: Any = None

    def moved(self, dtype: torch.dtype, device: torch.device) -> None:
        # what arrives in another precision is refused there, as for a model made in this one
        self._dtype, self._device, self._whole = dtype, device, None

    def rows(self, index: Tensor) -> Any:
        positions = [int(i) for i in index]
        # items may draw at random (augmentation) and know no generator
        with rng.scoped(rng.split(0, "items", *positions[:2])):
            items = default_collate([self._dataset[i] for i in positions])
        return self._seen(_arrived(items, self._dtype, self._device))[0]

    def whole(self) -> Any:
        if self._whole is None:
            self._whole = self.rows(torch.arange(self.num_data))
        return self._whole

    def sample(self) -> Any:
        return self.rows(torch.arange(min(4, self.num_data)))


class _Loader(DataSource):
    """A DataLoader: its own source of minibatches, re-seeded at each epoch so that a step always sees the same data."""

    def __init__(self, loader: DataLoader[Any], num_data: int | None, dtype: torch.dtype, device: torch.device) -> None:
        size = len(loader.dataset) if isinstance(loader.dataset, Sized) else None
        if size is None and num_data is None:
            raise DataError("the DataLoader's dataset has no len(): give the size of the whole data set as num_data=.")
        self.num_data = num_data if size is None and num_data is not None else int(size or 0)
        if self.num_data == 0:
            raise DataError("the DataLoader's dataset is empty.")
        self.loader, self._dtype, self._device = loader, dtype, device
        self._whole: Any = None
        self.own_batch_size = loader.batch_size
        if loader.batch_size is None and size is None:
            # a stream of ready-made batches: the first says how large they are
            self.own_batch_size = min(next((count for _, count in self.epoch(0, 0)), 0), self.num_data) or None

    def moved(self, dtype: torch.dtype, device: torch.device) -> None:
        # what arrives in another precision is refused there, as for a model made in this one
        self._dtype, self._device, self._whole = dtype, device, None

    def epoch(self, seed: int, number: int) -> Iterator[tuple[Any, int]]:
        """Yield the batches of an epoch; the same for the same seed and number."""
        if isinstance(self.loader.generator, torch.Generator):
            self.loader.generator.set_state(rng.generator(seed, "loader", number).get_state())
        with rng.scoped(rng.split(seed, "loader", number)):
            running = iter(self.loader)
        position = 0
        while True:
            with rng.scoped(rng.split(seed, "loader", number, position)):
                try:
                    got = next(running)
                except StopIteration:
                    return
            yield self._seen(_arrived(got, self._dtype, self._device))
            position += 1

    def whole(self) -> Any:
        if self._whole is None:
            seen = [data for data, _ in self.epoch(0, 0)]
            if not seen:
                raise DataError("the DataLoader gave no batch.")
            joined = zip(*(named_parts(data).values() for data in seen), strict=True)
            parts = iter([torch.cat(column) for column in joined])
            self._whole = map_data(lambda _: next(parts), seen[0])
        return self._whole

    def sample(self) -> Any:
        for data, _ in self.epoch(0, 0):
            return data
        raise DataError("the DataLoader gave no batch.")

    def rows(self, index: Tensor) -> Any:
        return take_rows(self.whole(), index)

    def batches(self, batch_size: int | None, *, seed: int) -> BatchSource:
        own = self.own_batch_size
        if batch_size is not None and batch_size != own:
            raise ConfigError(f"the DataLoader makes batches of {own}: leave batch_size out, or set it there.")
        return _LoaderBatches(self, rng.check_seed(seed))


class _LoaderBatches(BatchSource):
    """Batches of a DataLoader addressed by step; steps behind are reached by reading the epoch again."""

    def __init__(self, source: _Loader, seed: int) -> None:
        self.source, self.seed = source, seed
        loader = source.loader
        self.per_epoch = len(loader) if isinstance(loader.dataset, Sized) else None
        if self.per_epoch == 0:
            raise DataError("the DataLoader gives no batch (drop_last with too few data).")
        kept = (self.per_epoch or 0) * (loader.batch_size or 1)
        self.dropped_per_epoch = max(source.num_data - kept, 0) if self.per_epoch and loader.drop_last else 0
        self._restart(0, 0)

    def _restart(self, epoch: int, first_step: int) -> None:
        self._epoch, self._next = epoch, first_step
        self._empty = True
        self._running = self.source.epoch(self.seed, epoch)
        self._last: Batch | None = None

    def at(self, step: int) -> Batch:
        """Return the batch of a step."""
        if self._last is not None and step == self._next - 1:
            return self._last
        if self.per_epoch is not None and (step < self._next or step // self.per_epoch != self._epoch):
            epoch = step // self.per_epoch
            if step < self._next or epoch != self._epoch:
                self._restart(epoch, epoch * self.per_epoch)
        elif step < self._next:
            self._restart(0, 0)
        while self._next <= step:
            self._advance()
        if self._last is None:
            raise DataError("the DataLoader gave no batch.")
        return self._last

    def _advance(self) -> None:
        for data, size in self._running:
            self._last, self._empty = Batch(data, size), False
            self._next += 1
            return
        if self._empty:
            raise DataError("the DataLoader gave no batch in a whole epoch.")
        last, step = self._last, self._next
        self._restart(self._epoch + 1, step)
        self._last = last


def _arrived(items: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, int]:
    try:
        moved = map_data(lambda part: part.to(device) if isinstance(part, Tensor) else part, items)
        return as_data(moved, dtype, device)
    except VifamilyError:
        raise
    except RuntimeError as error:
        raise DataError(f"a batch could not be moved to {device}: {error}") from error


def data_source(data: Any, num_data: int | None, dtype: torch.dtype, device: torch.device) -> DataSource:
    """Return the source for any form of data.

    Raises:
        DataError: If the data cannot be used, or ``num_data`` disagrees with their length.
    """
    if num_data is not None:
        check_count(num_data, "num_data")
    source: DataSource
    if isinstance(data, DataLoader):
        source = _Loader(data, num_data, dtype, device)
    elif isinstance(data, TensorDataset):
        source = _Tensors(data.tensors, dtype, device)
    elif isinstance(data, Dataset):
        source = _Items(data, dtype, device)
    else:
        source = _Tensors(data, dtype, device)
    if num_data is not None and num_data != source.num_data:
        raise DataError(f"num_data={num_data} was given, but the data hold {source.num_data}. Leave num_data out.")
    return source
