"""The batches of stage 1: images by run position, decoded ahead of the training step."""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from iomm.config import InputError
from iomm.engine.data.decode import DecodeError, Decoder
from iomm.engine.data.order import Order
from iomm.kernels.philox import FLIP, uniform

NUM_READERS = 4        # threads that wait for the disk; a photograph of 80 KB costs them 0.04 ms of CPU
BATCHES_READ_AHEAD = 4
BATCHES_DECODED_AHEAD = 2


@dataclass
class Batch:
    """One micro-batch: where its samples stand in the run and in the index, their pixels, and the wait for them."""

    n_B: torch.Tensor                  # int64, on the CPU; names the sample's random numbers
    entry_B: torch.Tensor              # int64, on the CPU
    pixels_BCHW: torch.Tensor          # float32, on the device
    vit_pixels_BCHW: torch.Tensor      # float32, on the device
    wait_s: float                      # how long the caller waited


class ImageSource:
    """Micro-batches of one rank for the steps start_step .. num_steps - 1 of the run, in order.

    Global batch b is run positions [b G, (b + 1) G), whatever the number of ranks: micro-batch a of rank r takes b G +
    (a W + r) m + [0, m), where G = global_batch, m = micro_batch, W = world_size, and a counts the G / (m W)
    accumulation steps. So the state of the loader is the step. A sample is mirrored if `flip` and its own random number
    say so. Raises InputError if G is not a multiple of m W, or larger than the number of samples.
    """

    def __init__(self, shards, *, seed, global_batch, micro_batch, rank, world_size, size_px, vit_px, device,
                 start_step=0, num_steps, flip=False, num_threads=2):
        if global_batch < 1 or micro_batch < 1 or global_batch % (micro_batch * world_size):
            raise InputError(f"train.global_batch must be a multiple of train.micro_batch x ranks, got {global_batch} "
                             f"and {micro_batch} x {world_size}")
        if len(shards) < global_batch:
            raise InputError(f"train.global_batch is {global_batch}, but there are only {len(shards)} samples: "
                             "lower it or add data")
        self.shards = shards
        self.seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.num_steps = num_steps
        self.flip = flip
        self.order = Order(seed, shards.shard_sizes)
        self.decoder = Decoder(micro_batch, size_px, vit_px, device, num_threads, prefetch=BATCHES_DECODED_AHEAD)

    @property
    def accumulation_steps(self):
        """Micro-batches of this rank in one step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def __len__(self):
        """Micro-batches in all."""
        return max(0, self.num_steps - self.start_step) * self.accumulation_steps

    def positions(self, step, accumulation_step):
        """Run positions (int64 array of m) of a micro-batch of this rank."""
        first = step * self.global_batch + (accumulation_step * self.world_size + self.rank) * self.micro_batch
        return np.arange(first, first + self.micro_batch, dtype=np.int64)

    def __iter__(self):
        """Yields one Batch per micro-batch."""
        on_the_way = deque()      # (n, entries) of the batches that the decoder has taken and not yet given back
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader") as readers:
            decoded = self.decoder(self._read(readers, on_the_way))
            try:
                for _ in range(len(self)):
                    asked = time.perf_counter()
                    pixels_BCHW, vit_pixels_BCHW = next(decoded)
                    wait_s = time.perf_counter() - asked
                    n, entries = on_the_way.popleft()
                    yield Batch(torch.from_numpy(n), torch.from_numpy(entries), pixels_BCHW, vit_pixels_BCHW, wait_s)
            except DecodeError as error:
                refused = [k for k in on_the_way[0][1].tolist() if self.decoder.refuses(self.shards.decodable_bytes(k))]
                names = ", ".join(map(self.shards.name, refused)) or f"an image ({' '.join(str(error).split())})"
                raise InputError(
                    f"DALI cannot decode {names}, though `iomm index` could: take it out and index again") from None
            finally:
                decoded.close()
                readers.shutdown(wait=True, cancel_futures=True)

    def _read(self, readers, on_the_way):
        """Yields (encoded images, flips) in order, with the next BATCHES_READ_AHEAD batches being read meanwhile."""
        reading = deque()
        plan = ((step, a) for step in range(self.start_step, self.num_steps) for a in range(self.accumulation_steps))
        for step, accumulation_step in plan:
            n = self.positions(step, accumulation_step)
            entries = self.order(n)
            reading.append((n, entries, [readers.submit(self.shards.decodable_bytes, k) for k in entries.tolist()]))
            if len(reading) > BATCHES_READ_AHEAD:
                yield self._finish(reading.popleft(), on_the_way)
        while reading:
            yield self._finish(reading.popleft(), on_the_way)

    def _finish(self, batch, on_the_way):
        n, entries, images = batch
        images = [image.result() for image in images]
        on_the_way.append((n, entries))
        return images, self._flips(n)

    def _flips(self, n):
        if not self.flip:
            return np.zeros(len(n), dtype=bool)
        return (uniform(self.seed, FLIP, torch.from_numpy(n), 1)[:, 0] < 0.5).numpy()
