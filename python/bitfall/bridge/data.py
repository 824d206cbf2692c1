"""Batches for an engine: DeepSpeed's data loader, and how a batch is passed to a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bitfall._core import Communicator


class RepeatingLoader:
    """Begins a loader again when it ends."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        epoch = 0
        while True:
            sampler = getattr(self._loader, "sampler", None)
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            yield from self._loader
            epoch += 1

    def __len__(self) -> int:
        return len(self._loader)


def make_loader(
    dataset: Any,
    batch_size: int,
    communicator: Communicator,
    *,
    data_sampler: Any = None,
    collate_fn: Any = None,
    num_local_io_workers: int = 0,
    pin_memory: bool = False,
    drop_last: bool = False,
    **_: Any,
) -> DataLoader[Any]:
    """Micro-batches of a dataset in random order; with several ranks, of this rank's share."""
    if data_sampler is None and not isinstance(dataset, IterableDataset):
        if communicator.world_size > 1:
            data_sampler = DistributedSampler(dataset, communicator.world_size, communicator.rank)
        else:
            data_sampler = RandomSampler(dataset)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=data_sampler,
        collate_fn=collate_fn,
        num_workers=num_local_io_workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
    )


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)


def call(module: Callable[..., Any], batch: Any) -> Any:
    """module(batch): a dict as keywords, a tuple or list as positions."""
    if isinstance(batch, dict):
        return module(**batch)
    if isinstance(batch, (tuple, list)):
        return module(*batch)
    return module(batch)
