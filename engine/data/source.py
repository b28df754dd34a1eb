"""Batches by run position, always full, read and decoded ahead of the training step."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iomm.config import InputError, choice
from iomm.engine.data.bad_samples import MAX_ATTEMPTS, Failure
from iomm.engine.data.decode import (
    CENTRE,
    DecodeError,
    Decoder,
    Encoded,
    decoded_sizes,
    send,
)
from iomm.engine.data.mixture import Joined
from iomm.engine.data.samplers import EpochPermutation, FixedSizeSampler, Sampler
from iomm.engine.data.shards import Damaged, Shards
from iomm.kernels.philox import CROP, FLIP, uniform

if TYPE_CHECKING:
    from iomm.caption_limit import CaptionLimit
    from iomm.engine.data.latents import EncodedSamples, LatentStore

# Threads that wait for the disk. A photograph of 80 KB costs them 0.04 ms of CPU.
NUM_READERS = 4
BATCHES_READ_AHEAD = 4
BATCHES_DECODED_AHEAD = 2


@dataclass
class Batch:
    """One micro-batch. Tensors are on the training device, unless a comment states otherwise."""

    # int64, on the CPU. Run positions, which also seed the random numbers of the samples.
    n_B: Tensor
    # int64, on the CPU. Index entries.
    entry_B: Tensor
    # None if there are latents.
    pixels_BCHW: Tensor | None
    # Bytes of the samples with has_image, in order. Of all samples with look_at_pairs.
    vit_pixels_BHWC: Tensor | None
    # Seconds for which the caller waited.
    wait_s: float
    # B texts, "" where has_image.
    captions: list[str] = field(default_factory=list)
    # B bools. The sample is conditioned on its image, not on its caption.
    has_image: list[bool] = field(default_factory=list)
    # float32.
    latents_BCHW: Tensor | None = None
    # Replaces vit_pixels_BHWC, which is then None.
    image_tokens_IPD: Tensor | None = None
    # What the condition consists of, drawn ahead on the host; in pinned memory with a GPU.
    turns: Any = None
    # Samples that were replaced, and captions that were cut.
    failures: list[Failure] = field(default_factory=list)
    # Output of IOMM.prepare for the pixels, if it has run ahead of the step.
    prepared: Any = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments of IOMM.forward."""
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
            self.turns,
        )


class ImageSource:
    """Micro-batches of one rank for the steps start_step .. num_steps - 1 of a run, in order.

    Global batch b is the run positions [b G, (b + 1) G) on any number of ranks. Micro-batch a of
    rank r takes the positions b G + (a W + r) m + [0, m), where G = global_batch, m = micro_batch,
    W = world_size, and a counts the G / (m W) accumulation steps. The state of the loader is
    therefore the step.

    A sample that is unreadable now (damaged on disk, refused by DALI) is replaced by the next one
    of its sampler, up to MAX_ATTEMPTS times, and then by a black image. The batch lists it in
    `failures`, the input of BadSamples. Batches are always full, so ranks stay in step. A caption
    that exceeds the MLLM's context is cut, and listed there too.
    """

    def __init__(
        self,
        shards: Shards | Joined,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        size_px: int,
        vit_px: int,
        device: torch.device | str,
        start_step: int = 0,
        num_steps: int,
        flip: bool = False,
        num_threads: int = 2,
        crop: str = "center",
        sampler: Sampler | None = None,
        latents: LatentStore | EncodedSamples | None = None,
        dtype: torch.dtype = torch.float32,
        hw_decoder_load: float = 0.65,
        resize: str = "torch",
        look_at_pairs: bool = False,
        caption_limit: CaptionLimit | None = None,
        draw_turns: Callable[[Tensor, list[str], list[bool]], Any] | None = None,
    ) -> None:
        """Check the settings. Reading starts with the iteration.

        Args:
            shards: the samples.
            seed: seed of the run.
            global_batch: samples per step of all ranks.
            micro_batch: samples per micro-batch of one rank.
            rank: this rank.
            world_size: number of ranks.
            size_px: side of the square crops. Only used without a sampler.
            vit_px: side of the ViT's square image.
            device: device of the batches.
            start_step: first step.
            num_steps: last step + 1.
            flip: mirror half of the samples, chosen by their own random numbers. A sample with a
                caption is never mirrored, because the caption may mention left or right.
            num_threads: CPU threads that decode and resize.
            crop: "center", or "random" to let a sample's own random numbers place the crop.
            sampler: order of the samples. By default all samples, in the order of
                EpochPermutation, on squares of size_px.
            latents: read latents from here in place of pixels. With EncodedSamples no image is read
                at all, and image tokens come from there as well.
            dtype: data type of the pixels.
            hw_decoder_load: share of baseline JPEGs decoded in hardware, see Decoder.
            resize: "dali" or "torch", see Decoder.
            look_at_pairs: return ViT pixels of pairs too, in order with those of the images.
            caption_limit: cuts captions that are too long for the MLLM. None: they stay as they
                are.
            draw_turns: called in a reader thread with n_B, captions and has_image of each batch.
                Batch.turns is its result.

        Raises:
            InputError: global_batch is not a multiple of micro_batch x world_size, or exceeds the
                number of samples, or latents are combined with flips or random crops.
        """
        if global_batch < 1 or micro_batch < 1 or global_batch % (micro_batch * world_size):
            raise InputError(
                "train.global_batch must be a multiple of train.micro_batch x ranks, got "
                f"{global_batch} and {micro_batch} x {world_size}"
            )
        if sampler is None and len(shards) < global_batch:
            raise InputError(
                f"train.global_batch is {global_batch}, but there are only {len(shards)} samples; "
                "lower it or add data"
            )
        choice("data.crop", crop, ("center", "random"))
        if latents and (flip or crop != "center"):
            raise InputError(
                "data.latents holds centre crops that are not mirrored; set data.flip=false and "
                "data.crop=center"
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
        # Latents and image tokens are in memory, and no image is decoded.
        self.encoded = getattr(latents, "tokens", None) is not None
        self.look_at_pairs = look_at_pairs
        self.caption_limit = caption_limit
        self.draw_turns = draw_turns
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
        # Reader threads call the sampler for replacements, and samplers have a cache.
        self._sampler_lock = Lock()

    @property
    def accumulation_steps(self) -> int:
        """Number of micro-batches of this rank in one step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank."""
        return max(0, self.num_steps - self.start_step) * self.accumulation_steps

    def positions(self, step: int, accumulation_step: int) -> np.ndarray:
        """Return the run positions (int64, (m,)) of a micro-batch of this rank."""
        first = (
            step * self.global_batch
            + (accumulation_step * self.world_size + self.rank) * self.micro_batch
        )
        return np.arange(first, first + self.micro_batch, dtype=np.int64)

    def __iter__(self) -> Iterator[Batch]:
        """Yield one Batch per micro-batch."""
        # Batches that the decoder has read and not returned yet.
        in_flight: deque[list[_Sample]] = deque()
        # What _draw returns for the batches that were read and not yielded yet.
        drawn: deque[Future] = deque()
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader") as readers:
            read = self._read(readers, drawn)
            if self.encoded:
                for _ in range(len(self)):
                    started = time.perf_counter()
                    samples = next(read)
                    wait_s = time.perf_counter() - started
                    yield self._batch(samples, drawn.popleft(), None, None, wait_s)
                return
            decoded = self.decoder(self._encoded(read, in_flight))
            try:
                for _ in range(len(self)):
                    started = time.perf_counter()
                    while True:
                        try:
                            pixels_BCHW, vit_pixels_BHWC = next(decoded)
                            break
                        except DecodeError as error:
                            # The error ended the pipeline, so all batches in flight are decoded
                            # again.
                            decoded.close()
                            self._replace_refused(in_flight[0], error)
                            again = list(in_flight)
                            in_flight.clear()
                            decoded = self.decoder(self._encoded(chain(again, read), in_flight))
                    wait_s = time.perf_counter() - started
                    yield self._batch(
                        in_flight.popleft(), drawn.popleft(), pixels_BCHW, vit_pixels_BHWC, wait_s
                    )
            finally:
                decoded.close()
                read.close()
                readers.shutdown(wait=True, cancel_futures=True)

    def _read(self, readers: ThreadPoolExecutor, drawn: deque[Future]) -> Iterator[list[_Sample]]:
        """Yield the samples of each micro-batch in order, reading BATCHES_READ_AHEAD ahead.

        The turns of each batch are appended to `drawn`.
        """
        reading = deque()
        micro_batches = (
            (step, a)
            for step in range(self.start_step, self.num_steps)
            for a in range(self.accumulation_steps)
        )
        for step, accumulation_step in micro_batches:
            n = self.positions(step, accumulation_step)
            with self._sampler_lock:
                entries = self.sampler(n)
                size_px = self.sampler.size_px(step)
                is_pair = self.sampler.is_pair(n)
            samples = [
                _Sample(*sample, size_px)
                for sample in zip(n.tolist(), entries.tolist(), is_pair.tolist(), strict=True)
            ]
            reading.append([readers.submit(self._fill, sample) for sample in samples])
            # The executor starts its tasks in order, so these samples are at least being read.
            drawn.append(readers.submit(self._draw, reading[-1]))
            if len(reading) > BATCHES_READ_AHEAD:
                yield [sample.result() for sample in reading.popleft()]
        while reading:
            yield [sample.result() for sample in reading.popleft()]

    def _fill(self, sample: _Sample) -> _Sample:
        """Read the data of a sample, or of its replacement."""
        sample.cut = None
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
        sample.image = _black(width, height)
        sample.caption = ""
        sample.latents = self.latents.zeros() if self.latents else None
        return sample

    def _draw(self, filled: list[Future]) -> Any:
        """Return the turns of the samples of a batch as soon as they are read."""
        return self._turns([sample.result() for sample in filled])

    def _turns(self, samples: list[_Sample]) -> Any:
        """Cut captions that are too long, and return what draw_turns returns, if it is set."""
        for sample in samples:
            self._fit_caption(sample)
        if self.draw_turns is None:
            return None
        turns = self.draw_turns(
            torch.tensor([sample.n for sample in samples]),
            [sample.caption for sample in samples],
            [not sample.is_pair for sample in samples],
        )
        return turns.pinned() if self.decoder.device.type == "cuda" else turns

    def _replace(self, sample: _Sample, problem: str) -> None:
        """Replace a sample by the next one in order, and record a failure once per position."""
        sample.attempt += 1
        fatal = sample.attempt > MAX_ATTEMPTS
        if sample.failure is None or fatal:
            first = sample.failure or Failure(sample.n, self.shards.shard(sample.entry), problem)
            sample.failure = Failure(first.n, first.shard, first.problem, fatal)
        with self._sampler_lock:
            sample.entry = int(self.sampler(np.array([sample.n]), sample.attempt)[0])

    def _replace_refused(self, samples: list[_Sample], error: DecodeError) -> None:
        """Replace the samples of a batch that DALI refuses, or all of them if none is found."""
        sizes = decoded_sizes([sample.image for sample in samples])
        refused = [
            sample for sample, size in zip(samples, sizes, strict=True) if size is None
        ] or samples
        for sample in refused:
            detail = (
                "" if len(refused) < len(samples) else f" ({' '.join(str(error).split())[:200]})"
            )
            self._replace(
                sample,
                f"{self.shards.name(sample.entry)}: DALI cannot decode it, although `iomm index` "
                f"could{detail}",
            )
            self._fill(sample)

    def _encoded(
        self, batches: Iterable[list[_Sample]], in_flight: deque[list[_Sample]]
    ) -> Iterator[Encoded]:
        """Yield the decoder's inputs, and append each batch to in_flight."""
        for samples in batches:
            in_flight.append(samples)
            n_B = torch.tensor([sample.n for sample in samples])
            is_pair = np.array([sample.is_pair for sample in samples])
            flip_B = np.zeros(len(samples), dtype=bool)
            if self.flip:
                flip_B = (uniform(self.seed, FLIP, n_B, 1)[:, 0] < 0.5).numpy() & ~is_pair
            place_B2 = np.full((len(samples), 2), CENTRE, dtype=np.float32)
            if self.crop == "random":
                place_B2 = uniform(self.seed, CROP, n_B, 2).numpy()
            yield Encoded(
                [sample.image for sample in samples],
                flip_B,
                place_B2,
                ~is_pair | self.look_at_pairs,
                samples[0].size_px,
            )

    def _batch(
        self,
        samples: list[_Sample],
        drawn: Future,
        pixels_BCHW: Tensor | None,
        vit_pixels_BHWC: Tensor | None,
        wait_s: float,
    ) -> Batch:
        failures = [sample.failure for sample in samples if sample.failure]
        # A sample that the decoder refused has been replaced since, by one with another caption.
        turns = self._turns(samples) if failures else drawn.result()
        latents_BCHW = tokens_IPD = None
        if self.latents:
            latents_BCHW = torch.stack([sample.latents for sample in samples])
            latents_BCHW = send(latents_BCHW, self.decoder.device).float()
        if self.encoded:
            entries = [sample.entry for sample in samples if not sample.is_pair]
            tokens_IPD = send(self.latents.tokens(entries), self.decoder.device)
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
            turns=turns,
            failures=[
                failure for sample in samples for failure in (sample.failure, sample.cut) if failure
            ],
        )

    def _fit_caption(self, sample: _Sample) -> None:
        """Cut the caption of a sample if it is too long, and record that in it."""
        if self.caption_limit is None or not sample.caption:
            return
        caption = self.caption_limit.cut(sample.caption)
        if caption != sample.caption:
            problem = (
                f"{self.shards.name(sample.entry)}: its caption of "
                f"{self.caption_limit.num_tokens(sample.caption):,} tokens was cut to the "
                f"{self.caption_limit.num_tokens(caption):,} that fit into the MLLM's context"
            )
            shard = self.shards.shard(sample.entry)
            sample.cut, sample.caption = Failure(sample.n, shard, problem, cut=True), caption


@dataclass
class _Sample:
    """A run position and the data that was read for it."""

    n: int
    entry: int
    is_pair: bool
    size_px: tuple[int, int]
    attempt: int = 0
    image: bytes = b""
    caption: str = ""
    latents: Tensor | None = None
    failure: Failure | None = None
    cut: Failure | None = None


def _black(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()
