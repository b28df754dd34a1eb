"""Batches by run position: read, decoded ahead of the training step, and always full."""

import io
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock

import numpy as np
import torch
from PIL import Image

from iomm.config import InputError, choice
from iomm.engine.data.bad_samples import Failure
from iomm.engine.data.decode import CENTRE, DecodeError, Decoder, Encoded, sizes
from iomm.engine.data.samplers import EpochPermutation, FixedSizeSampler
from iomm.engine.data.shards import Damaged
from iomm.kernels.philox import CROP, FLIP, uniform

# Threads that wait for the disk; a photograph of 80 KB costs them 0.04 ms of CPU.
NUM_READERS = 4
BATCHES_READ_AHEAD = 4
BATCHES_DECODED_AHEAD = 2
# Samples tried in the place of one that cannot be had.
MAX_ATTEMPTS = 16


@dataclass
class Batch:
    """One micro-batch: where its samples stand in the run and in the index, what they are, and the wait for them."""

    # int64, on the CPU; names the sample's random numbers
    n_B: torch.Tensor
    # int64, on the CPU
    entry_B: torch.Tensor
    # On the device; None if the latents are there.
    pixels_BCHW: torch.Tensor | None
    # bytes, on the device; of the samples with has_image, in order (of all with look_at_pairs)
    vit_pixels_BHWC: torch.Tensor | None
    # How long the caller waited.
    wait_s: float
    # B texts, "" where has_image.
    captions: list = field(default_factory=list)
    # B bools: conditioned on its image, not on its caption.
    has_image: list = field(default_factory=list)
    # float32, on the device
    latents_BCHW: torch.Tensor | None = None
    # On the device; in place of vit_pixels_BHWC, which is None then.
    image_tokens_IPD: torch.Tensor | None = None
    # of Failure: samples that were replaced
    failures: list = field(default_factory=list)
    # what IOMM.prepare made of the pixels, where it has run ahead
    prepared: object = None

    @property
    def inputs(self):
        """Arguments of IOMM.forward."""
        if self.prepared is not None:
            return (self.prepared,)
        return (
            self.pixels_BCHW,
            self.vit_pixels_BHWC,
            self.n_B,
            self.latents_BCHW,
            self.captions,
            self.has_image,
            self.image_tokens_IPD,
        )


class ImageSource:
    """Micro-batches of one rank for the steps start_step .. num_steps - 1 of the run, in order.

    Global batch b is run positions [b G, (b + 1) G), whatever the number of ranks: micro-batch a of rank r takes b G +
    (a W + r) m + [0, m), where G = global_batch, m = micro_batch, W = world_size, and a counts the G / (m W)
    accumulation steps. So the state of the loader is the step. `plan` (see samplers.FixedSizeSampler) says which samples these are;
    without one, all samples in their order on squares of size_px. A sample is mirrored if `flip` and its own random
    number say so, but never one with a caption, which may say left or right; crop="random" lets its own numbers choose
    the place of the crop, else it is the centre. With `latents` (latents.LatentStore) its latents come instead of pixels;
    with latents.EncodedSamples no image is read at all, and image tokens come as well. look_at_pairs: ViT pixels of pairs
    too, in their place among the others'.

    A sample that can no longer be had (damaged on disk, refused by DALI) is replaced by the next one of its plan, up to
    MAX_ATTEMPTS times, then by black; the batch says so in `failures` (for BadSamples), and is full in any case, so that ranks
    stay in step. Raises InputError if G is not a multiple of m W or, without a plan, larger than the number of samples.
    """

    def __init__(
        self,
        shards,
        *,
        seed,
        global_batch,
        micro_batch,
        rank,
        world_size,
        size_px,
        vit_px,
        device,
        start_step=0,
        num_steps,
        flip=False,
        num_threads=2,
        crop="center",
        sampler=None,
        latents=None,
        dtype=torch.float32,
        hw_decoder_load=0.65,
        resize="torch",
        look_at_pairs=False,
    ):
        if global_batch < 1 or micro_batch < 1 or global_batch % (micro_batch * world_size):
            raise InputError(
                f"train.global_batch must be a multiple of train.micro_batch x ranks, got {global_batch} "
                f"and {micro_batch} x {world_size}"
            )
        if sampler is None and len(shards) < global_batch:
            raise InputError(
                f"train.global_batch is {global_batch}, but there are only {len(shards)} samples: "
                "lower it or add data"
            )
        choice("data.crop", crop, ("center", "random"))
        if latents and (flip or crop != "center"):
            raise InputError(
                "data.latents are those of centre crops as they are: set data.flip=false, data.crop=center"
            )
        self.shards = shards
        self.seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.num_steps = num_steps
        self.flip = flip
        self.crop = crop
        self.latents = latents
        # Nothing is left to decode.
        self.encoded = getattr(latents, "tokens", None) is not None
        self.look_at_pairs = look_at_pairs
        self.sampler = sampler or FixedSizeSampler(
            EpochPermutation(seed, shards.shard_sizes), size_px
        )
        self.decoder = Decoder(
            micro_batch,
            vit_px,
            device,
            num_threads,
            prefetch=BATCHES_DECODED_AHEAD,
            dtype=dtype,
            vae_pixels=latents is None,
            hw_decoder_load=hw_decoder_load,
            resize=resize,
        )
        # Readers ask for replacements; orders keep a small cache.
        self._order_lock = Lock()

    @property
    def accumulation_steps(self):
        """Micro-batches of this rank in one step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def __len__(self):
        """Micro-batches in all."""
        return max(0, self.num_steps - self.start_step) * self.accumulation_steps

    def positions(self, step, accumulation_step):
        """Run positions (int64 array of m) of a micro-batch of this rank."""
        first = (
            step * self.global_batch
            + (accumulation_step * self.world_size + self.rank) * self.micro_batch
        )
        return np.arange(first, first + self.micro_batch, dtype=np.int64)

    def __iter__(self):
        """Yields one Batch per micro-batch."""
        # Batches that the decoder has taken and not yet given back, as lists of _Sample.
        on_the_way = deque()
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader") as readers:
            read = self._read(readers)
            if self.encoded:
                for _ in range(len(self)):
                    asked = time.perf_counter()
                    samples = next(read)
                    yield self._batch(samples, None, None, time.perf_counter() - asked)
                return
            decoded = self.decoder(self._encoded(read, on_the_way))
            try:
                for _ in range(len(self)):
                    asked = time.perf_counter()
                    while True:
                        try:
                            pixels_BCHW, vit_pixels_BHWC = next(decoded)
                            break
                        except DecodeError as error:
                            # it took the pipeline with it: what was on the way goes again
                            decoded.close()
                            self._replace_refused(on_the_way[0], error)
                            again = list(on_the_way)
                            on_the_way.clear()
                            decoded = self.decoder(self._encoded(chain(again, read), on_the_way))
                    wait_s = time.perf_counter() - asked
                    yield self._batch(on_the_way.popleft(), pixels_BCHW, vit_pixels_BHWC, wait_s)
            finally:
                decoded.close()
                read.close()
                readers.shutdown(wait=True, cancel_futures=True)

    def _read(self, readers):
        """Yields lists of _Sample in order, with the next BATCHES_READ_AHEAD batches being read meanwhile."""
        reading = deque()
        plan = (
            (step, a)
            for step in range(self.start_step, self.num_steps)
            for a in range(self.accumulation_steps)
        )
        for step, accumulation_step in plan:
            n = self.positions(step, accumulation_step)
            with self._order_lock:
                entries, size_px, is_pair = (
                    self.sampler(n),
                    self.sampler.size_px(step),
                    self.sampler.is_pair(n),
                )
            samples = [
                _Sample(*sample, size_px)
                for sample in zip(n.tolist(), entries.tolist(), is_pair.tolist())
            ]
            reading.append([readers.submit(self._fill, sample) for sample in samples])
            if len(reading) > BATCHES_READ_AHEAD:
                yield [sample.result() for sample in reading.popleft()]
        while reading:
            yield [sample.result() for sample in reading.popleft()]

    def _fill(self, sample):
        """Reads what belongs to a sample, or to the one that takes its place."""
        while sample.attempt <= MAX_ATTEMPTS:
            k = sample.entry
            try:
                if not self.encoded:
                    sample.image = self.shards.decodable_bytes(k)
                sample.caption = self.shards.caption(k) if sample.is_pair else ""
                sample.latents = self.latents.read(k) if self.latents else None
                return sample
            except Damaged as error:
                self._replace(sample, str(error))
        height, width = sample.size_px
        sample.image, sample.caption = _black(width, height), ""
        sample.latents = self.latents.zeros() if self.latents else None
        return sample

    def _replace(self, sample, problem):
        """Points the sample at the next one of its plan, and counts its position once."""
        sample.attempt += 1
        fatal = sample.attempt > MAX_ATTEMPTS
        if sample.failure is None or fatal:
            first = sample.failure or Failure(sample.n, self.shards.shard(sample.entry), problem)
            sample.failure = Failure(first.n, first.shard, first.problem, fatal)
        with self._order_lock:
            sample.entry = int(self.sampler(np.array([sample.n]), sample.attempt)[0])

    def _replace_refused(self, samples, error):
        """Replaces the samples of a batch that DALI refuses; all of them if it does not say which."""
        seen = sizes([sample.image for sample in samples])
        refused = [sample for sample, size in zip(samples, seen) if size is None] or samples
        for sample in refused:
            detail = (
                "" if len(refused) < len(samples) else f" ({' '.join(str(error).split())[:200]})"
            )
            self._replace(
                sample,
                f"{self.shards.name(sample.entry)}: DALI cannot decode it, though `iomm index` could"
                + detail,
            )
            self._fill(sample)

    def _encoded(self, batches, on_the_way):
        for samples in batches:
            on_the_way.append(samples)
            n_B = torch.tensor([sample.n for sample in samples])
            is_pair = np.array([sample.is_pair for sample in samples])
            flip_B = np.zeros(len(samples), dtype=bool)
            if self.flip:
                flip_B = (uniform(self.seed, FLIP, n_B, 1)[:, 0] < 0.5).numpy() & ~is_pair
            place_B2 = np.full((len(samples), 2), CENTRE, dtype=np.float32)
            if self.crop == "random":
                place_B2 = uniform(self.seed, CROP, n_B, 2).numpy()
            looked_at_B = ~is_pair | self.look_at_pairs
            yield Encoded(
                [sample.image for sample in samples],
                flip_B,
                place_B2,
                looked_at_B,
                samples[0].size_px,
            )

    def _batch(self, samples, pixels_BCHW, vit_pixels_BHWC, wait_s):
        latents_BCHW = tokens_IPD = None
        if self.latents:
            latents_BCHW = (
                torch.stack([sample.latents for sample in samples]).to(self.decoder.device).float()
            )
        if self.encoded:
            entries = [sample.entry for sample in samples if not sample.is_pair]
            tokens_IPD = self.latents.tokens(entries).to(self.decoder.device)
        return Batch(
            torch.tensor([sample.n for sample in samples]),
            torch.tensor([sample.entry for sample in samples]),
            pixels_BCHW,
            vit_pixels_BHWC,
            wait_s,
            captions=[sample.caption for sample in samples],
            has_image=[not sample.is_pair for sample in samples],
            latents_BCHW=latents_BCHW,
            image_tokens_IPD=tokens_IPD,
            failures=[sample.failure for sample in samples if sample.failure],
        )


@dataclass
class _Sample:
    """One position of the run and what was read for it."""

    n: int
    entry: int
    is_pair: bool
    size_px: tuple
    attempt: int = 0
    image: bytes = b""
    caption: str = ""
    latents: torch.Tensor | None = None
    failure: Failure | None = None


def _black(width, height):
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()
