"""Batches of a `TPP_PPG_dataset`: their order, and how they are read.

    for ppg, map_, dbp, hr, tpp in make_loader(train, 256, shuffle=True): ...

The order depends only on seed and epoch, so a run can be resumed at any batch, with any number of
workers. Needs datasets.py.
"""
import signal
import sys
from contextlib import suppress

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from datasets import ENCODED, WAVEFORMS, DataError


class BatchOrder(Sampler):
    """The batches of an epoch as arrays of item numbers, a function of (seed, epoch). drop_last
    drops an incomplete batch unless it is the only batch. With several processes, each (rank of
    world) takes its slice of every batch, so that a step sees the same items as with one process.
    Without `set_epoch`, each pass is the next epoch."""

    def __init__(self, dataset, batch_size, shuffle, seed=0, drop_last=False, rank=0, world=1):
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.drop_last, self.rank, self.world = drop_last, rank, world
        self.epoch, self.first_batch = 0, 0

    def set_epoch(self, epoch, first_batch=0):
        self.epoch, self.first_batch = epoch, first_batch
        self.dataset.set_epoch(epoch)

    def __len__(self):
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not (self.drop_last and full > 0))

    def __iter__(self):
        count = len(self.dataset)
        kind = torch.int32 if count < 2 ** 31 else torch.int64
        order = torch.arange(count, dtype=kind)
        if self.shuffle:
            seed = int(np.random.default_rng([self.seed, self.epoch]).integers(2 ** 62))
            source = torch.Generator().manual_seed(seed)
            order = torch.randperm(count, dtype=kind, generator=source)
        for batch in range(self.first_batch, len(self)):
            items = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            yield np.array_split(items.numpy(), self.world)[self.rank]
        self.epoch, self.first_batch = self.epoch + 1, 0


class Loader:
    """The batches of a `BatchOrder` as tuples of tensors. device None: a `DataLoader` reads them;
    else all the data are held on `device` and batches are gathered there."""

    def __init__(self, order, device, workers, **options):
        self.sampler, self.dataset, self.device = order, order.dataset, device
        self.workers = workers
        if device is None:
            self.batches = DataLoader(
                order.dataset, batch_size=None, sampler=order, num_workers=workers,
                persistent_workers=workers > 0, collate_fn=tuple, worker_init_fn=quiet_worker,
                **options)
            return
        count = len(self.dataset.index)
        self.held = [torch.empty((count, *column.shape[1:]), device=device)
                     for column in self.dataset.read(np.arange(1))]
        for segments in np.array_split(np.arange(count), 1 + count // 1024):
            for values, part in zip(self.held, self.dataset.read(segments)):
                values[segments[0]:segments[-1] + 1] = part

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        if self.device is not None:
            for items in self.sampler:
                segments = torch.from_numpy(self.dataset.segments(items)).to(self.device)
                yield tuple(values.index_select(0, segments) for values in self.held)
            return
        try:
            if self.workers:
                self.dataset.epoch.share_memory_()      # workers see `set_epoch`
            batches = iter(self.batches)
            if self.workers:
                with suppress(ValueError, AttributeError):          # in a thread; on Windows
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # PyTorch's may raise anywhere
            yield from batches
        except (RuntimeError, OSError, DataError) as error:
            if not self.workers:
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            if isinstance(error, DataError):            # its text is the worker's traceback
                raise DataError(lines[-1].split("DataError: ")[-1]) from None
            raise DataError(f"a loader worker failed ({lines[0][:150]}); if memory or /dev/shm is "
                            "full, use fewer --workers or enlarge /dev/shm") from None


def make_loader(dataset, batch_size, shuffle=False, seed=0, workers=0, drop_last=None,
                pin_memory=False, rank=0, world=1, device_cache=None) -> Loader:
    """A `Loader`. drop_last: the same as shuffle by default. device_cache: a device; data that fit
    in half of its free memory are kept there (`loader.device` is then the device, else None).
    `loader.sampler.set_epoch(epoch, first_batch)` chooses where to begin."""
    order = BatchOrder(dataset, batch_size, shuffle, seed,
                       shuffle if drop_last is None else drop_last, rank, world)
    if device_cache is not None:
        device = torch.device(device_cache)
        size = 4 * len(dataset.index) * sum(map(torch.numel, dataset.read(np.arange(1))))
        if device.type != "cuda" or 2 * size <= torch.cuda.mem_get_info(device)[0]:
            return Loader(order, device, 0)
        pin_memory = True           # batches are copied to the device
    slow = dataset.index.stored[dataset.index.fields == "ppg"][0] == ENCODED
    if shuffle and rank == 0 and "ppg" in dataset.keys_to_load and slow.any():
        path = dataset.index.paths[dataset.index.encounter_file[slow.argmax()]]
        print(f"WARNING: {path}: PPG that is compressed, in chunks or not float32 is slow to read "
              f"shuffled; rewrite it once: h5repack -l CONTI -f NONE {path} NEW", file=sys.stderr)
    for key in set(dataset.keys_to_load) - set(WAVEFORMS):
        dataset.column(key)                         # before workers start, so that they share it
    own = torch.Generator().manual_seed(seed)       # else dropout would depend on the workers
    return Loader(order, None, workers, generator=own, pin_memory=pin_memory)


def quiet_worker(_):
    """Leave Ctrl-C and error messages to the parent: a worker prints no traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = lambda *error: None
