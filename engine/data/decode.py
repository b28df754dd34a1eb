"""Decode images to VAE pixels and ViT pixels, with DALI or its substitute.

This is the only file that uses DALI. Where DALI is not installed, Pillow and torch replace it.
"""

import io
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

try:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline
except ImportError:
    # There is no wheel for this machine. Pillow decodes instead, and `iomm doctor` reports it.
    fn = types = Pipeline = None

from iomm.config import InputError, choice
from iomm.engine.data.image import check_image, on_white

logger = logging.getLogger("iomm")

CENTRE = 0.5
# Grey level that becomes 0 in [-1, 1].
MID_GREY = 127.5
# Rounded to float32, as DALI multiplies by it.
INVERSE_GREY = (torch.tensor(1.0) / MID_GREY).item()

# pixels_BCHW (None if they were not asked for), vit_pixels_IHWC.
Decoded = tuple[Tensor | None, Tensor]


class DecodeError(Exception):
    """An image of the next batch cannot be decoded. DALI does not always report which one."""


@dataclass(frozen=True)
class Encoded:
    """A batch of encoded images, the input of the decoder."""

    images: list[bytes]
    # bool. Mirrored left to right.
    flip_B: np.ndarray
    # float32, (x, y) in [0, 1]. Position of the crop in the space that it leaves on each axis.
    place_B2: np.ndarray
    # bool. The ViT sees the sample.
    has_image_B: np.ndarray
    # (height, width) of the VAE pixels of the whole batch.
    size_px: tuple[int, int]


@dataclass(frozen=True)
class _Work:
    """Images of a batch that threads write into their places."""

    threads: list[Future]
    # Pixels of the VAE (None if they were not asked for) and of the ViT.
    outputs: list[Tensor | None]

    def succeeded(self) -> bool:
        """Return whether all images are done, and none failed."""
        return all(image.done() and image.exception() is None for image in self.threads)

    def result(self) -> list[Tensor | None]:
        """Wait for all images and return the outputs.

        Raises:
            DecodeError: an image cannot be decoded.
        """
        for image in self.threads:
            image.result()
        return self.outputs


class Decoder:
    """Decoder of batches of images in its own threads, `prefetch` batches ahead of the consumer.

    A call with an iterable of Encoded yields (pixels_BCHW, vit_pixels_IHWC) of each batch, in
    order, on `device` and in memory that is not reused:

    - pixels_BCHW is RGB in [-1, 1] at size_px in `dtype`, or None without `vae_pixels`.
    - vit_pixels_IHWC is RGB bytes at vit_px x vit_px of the I samples with has_image_B.
      MLLM.vit_states normalises them.

    An image is resized until it just covers size_px (cubic, antialiased) and cropped at its place.
    A flipped sample is mirrored. The ViT sees the same crop, resized to its square (cubic,
    antialiased). EXIF orientation is applied. Grey, CMYK and 16-bit images become 8-bit RGB, and an
    alpha channel is dropped.

    On CUDA nvJPEG decodes, and `hw_decoder_load` is the share of baseline JPEGs that it decodes in
    hardware. Without DALI Pillow decodes and torch resizes in `num_threads` threads of the CPU. A
    GPU then gets bytes from pinned memory on a separate stream, and scales them itself.

    Nothing is read beyond the end of `batches`, and an error raised by `batches` is raised
    unchanged. An image that DALI refuses costs the whole batch and the pipeline: DecodeError is
    raised when that batch is due.
    """

    def __init__(
        self,
        batch_size: int,
        vit_px: int,
        device: torch.device | str,
        num_threads: int = 2,
        prefetch: int = 2,
        *,
        dtype: torch.dtype = torch.float32,
        vae_pixels: bool = True,
        hw_decoder_load: float = 0.65,
        resize: str = "torch",
    ) -> None:
        """Check the settings and log if DALI is missing.

        Args:
            batch_size: the most images in a batch.
            vit_px: side of the ViT's square image.
            device: device of the outputs.
            num_threads: CPU threads that decode and resize.
            prefetch: batches decoded ahead.
            dtype: data type of pixels_BCHW.
            vae_pixels: return pixels_BCHW.
            hw_decoder_load: share of baseline JPEGs decoded in hardware, in [0, 1].
            resize: "dali" or "torch". On a CPU, "torch" uses DALI only to decode, and torch's
                vectorised resize of bytes for the rest. A photograph at 512 px takes 1.0 ms of CPU
                where DALI takes 7.5 ms, and differs by less than half a grey level. On CUDA it has
                no effect.

        Raises:
            InputError: `resize` or `hw_decoder_load` is out of range.
        """
        choice("data.resize", resize, ("dali", "torch"))
        if not 0 <= hw_decoder_load <= 1:
            raise InputError(f"data.hw_decoder_load must be between 0 and 1, got {hw_decoder_load}")
        self.batch_size = batch_size
        self.vit_px = vit_px
        self.device = torch.device(device)
        self.num_threads = num_threads
        self.prefetch = prefetch
        self.dtype = dtype
        self.vae_pixels = vae_pixels
        self.hw_decoder_load = hw_decoder_load
        if fn is None:
            logger.warning(
                "DALI is not installed: Pillow decodes and torch resizes images on the CPU "
                "(see `iomm doctor`)"
            )
        self.resize_by_torch = fn is not None and resize == "torch" and self.device.type == "cpu"
        # Images, places, sizes and flips. DALI warns about inputs that the pipeline does not use.
        self._num_inputs = (
            1 if self.resize_by_torch else 4 if vae_pixels or self.device.type == "cuda" else 3
        )
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, batches: Iterable[Encoded]) -> Iterator[Decoded]:
        """Yield the decoded `batches`. The DALI pipeline is freed when the iterator ends.

        Raises:
            DecodeError: an image of the next batch cannot be decoded.
        """
        # The threads start with the first work submitted.
        threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix="resize")
        if fn is None:
            yield from self._by_pillow(batches, threads)
            return
        # Batches that DALI has read and not returned yet.
        taken: list[Encoded] = []
        pipe = self._pipeline(self._inputs(batches, taken))
        pipe.build()
        try:
            while True:
                try:
                    outputs = pipe.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    # DALI's errors differ only in their text.
                    if "fn.decoders.image" not in str(error):
                        raise
                    raise DecodeError(str(error)) from None
                if self.resize_by_torch:
                    images = [np.asarray(outputs[0].at(i)) for i in range(len(taken[0].images))]
                    yield tuple(self._work(taken.pop(0), images.__getitem__, threads).result())
                else:
                    yield self._finish(outputs, taken.pop(0))
        finally:
            threads.shutdown(cancel_futures=True)
            del pipe

    def _by_pillow(
        self, batches: Iterable[Encoded], threads: ThreadPoolExecutor
    ) -> Iterator[Decoded]:
        """Yield the decoded batches without DALI. The threads decode and resize ahead."""
        waiting: deque[_Work] = deque()
        # The next batch, on its way to the device.
        next_sent = None
        batches = iter(batches)
        try:
            while True:
                while len(waiting) <= self.prefetch and (batch := next(batches, None)) is not None:
                    images = batch.images
                    waiting.append(
                        self._work(batch, lambda i, images=images: upright(images[i]), threads)
                    )
                sent, next_sent = next_sent, None
                if sent is None and not waiting:
                    return
                if sent is None:
                    sent = self._send(waiting.popleft())
                # An image that cannot be decoded is reported when its own batch is due.
                if self.device.type != "cpu" and waiting and waiting[0].succeeded():
                    next_sent = self._send(waiting.popleft())
                yield self._receive(*sent)
        finally:
            threads.shutdown(cancel_futures=True)

    def _send(self, work: _Work) -> tuple[list[Tensor | None], torch.cuda.Event | None]:
        """Wait for the threads, and queue the copies to the device on the copy stream.

        Returns the copies and the event after them.
        """
        outputs = work.result()
        if self.device.type == "cpu":
            return outputs, None
        # A stream of None has no effect.
        with torch.cuda.stream(self._copy_stream):
            copies = [None if output is None else send(output, self.device) for output in outputs]
            event = None if self._copy_stream is None else self._copy_stream.record_event()
        return copies, event

    def _receive(self, copies: list[Tensor | None], event: torch.cuda.Event | None) -> Decoded:
        """Let the current stream wait for the copies, and scale the pixels there."""
        pixels, vit_pixels_IHWC = copies
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for copy in copies:
                if copy is not None:
                    copy.record_stream(current)
        if pixels is not None and self.device.type != "cpu":
            pixels = scaled(pixels, self.dtype)
        return pixels, vit_pixels_IHWC

    def _inputs(
        self, batches: Iterable[Encoded], taken: list[Encoded]
    ) -> Iterator[tuple[Any, ...]]:
        """Yield DALI's inputs for each batch: images, places, sizes, and flips if it mirrors.

        Each batch is appended to `taken` when DALI reads it.
        """
        for batch in batches:
            taken.append(batch)
            yield (
                [np.frombuffer(image, dtype=np.uint8) for image in batch.images],
                np.asarray(batch.place_B2, dtype=np.float32),
                np.tile(np.asarray(batch.size_px, dtype=np.float32), (len(batch.images), 1)),
                np.asarray(batch.flip_B, dtype=np.int32).reshape(-1, 1),
            )[: self._num_inputs]

    def _finish(self, outputs: Any, batch: Encoded) -> Decoded:
        """Copy DALI's outputs into tensors owned by torch."""
        flip_B, has_image_B = (
            torch.as_tensor(np.asarray(x, dtype=bool)) for x in (batch.flip_B, batch.has_image_B)
        )
        if self.device.type != "cuda":
            crops_BHWC = torch.from_dlpack(outputs[-1].as_tensor())
            pixels_BCHW = (
                torch.from_dlpack(outputs[0].as_tensor()).to(self.dtype, copy=True)
                if self.vae_pixels
                else None
            )
            return pixels_BCHW, self._vit_pixels(crops_BHWC[has_image_B], flip_B[has_image_B])
        # DALI reuses its buffers once `outputs` is dropped, without waiting for torch's stream. The
        # copies are therefore made and synchronised on a side stream, which does not wait for the
        # training step in the queue.
        with torch.cuda.stream(self._copy_stream):
            *pixels, vit_pixels = (torch.from_dlpack(output.as_tensor()) for output in outputs)
            copies = [x.to(self.dtype, copy=True) for x in pixels]
            if has_image_B.all():
                copies.append(vit_pixels.clone())
            else:
                rows_I = has_image_B.nonzero().squeeze(1)
                copies.append(vit_pixels.index_select(0, send(rows_I, self.device)))
        self._copy_stream.synchronize()
        for copy in copies:
            copy.record_stream(torch.cuda.current_stream(self.device))
        return copies[0] if self.vae_pixels else None, copies[-1]

    def _vit_pixels(self, crops_IHWC: Tensor, flip_I: Tensor) -> Tensor:
        """Return the ViT's images (I, vit_px, vit_px, 3) of crops on the CPU.

        torch's resize of bytes is a vectorised version of Pillow's. It takes 1.6 ms from 512 to
        448 px where DALI takes 20 ms.
        """
        out = self._bytes(len(crops_IHWC), self.vit_px, self.vit_px)
        for pixels, crop, flip in zip(out, crops_IHWC, flip_I.tolist(), strict=True):
            self._write_vit(crop.permute(2, 0, 1)[None], flip, pixels)
        return out

    def _bytes(self, num_images: int, height: int, width: int) -> Tensor:
        """Return memory for images on the host, pinned if they go to a GPU."""
        return torch.empty(
            (num_images, height, width, 3),
            dtype=torch.uint8,
            pin_memory=self.device.type == "cuda",
        )

    def _write_vit(self, crop_1CHW: Tensor, flip: bool, out_HWC: Tensor) -> None:
        """Resize a crop (bytes) for the ViT, mirror it if `flip`, and write it to out_HWC."""
        write_bytes(resized(crop_1CHW, (self.vit_px, self.vit_px)), flip, out_HWC)

    def _work(
        self, batch: Encoded, load: Callable[[int], np.ndarray], threads: ThreadPoolExecutor
    ) -> _Work:
        """Start to resize, crop and mirror images, one per thread.

        Results for a GPU are bytes in pinned memory, a quarter of what the pixels take as float32.

        Args:
            batch: the batch.
            load: returns an image (HWC bytes of any size). Called in the threads.
            threads: the threads.
        """
        (height, width), num = batch.size_px, len(batch.images)
        as_bytes = self.device.type != "cpu"
        pixels = None
        if self.vae_pixels and as_bytes:
            pixels = self._bytes(num, height, width)
        elif self.vae_pixels:
            pixels = torch.empty((num, 3, height, width), dtype=self.dtype)
        places_I = np.cumsum(batch.has_image_B) - 1
        vit_pixels_IHWC = self._bytes(int(np.sum(batch.has_image_B)), self.vit_px, self.vit_px)

        def finish(i: int) -> None:
            image = torch.from_numpy(load(i)).permute(2, 0, 1)[None]
            scale = max(height / image.shape[-2], width / image.shape[-1])
            image = resized(
                image,
                tuple(
                    max(round(side * scale), least)
                    for side, least in zip(image.shape[-2:], (height, width), strict=True)
                ),
            )
            left, top = (
                int(float(at) * (side - crop))
                for at, side, crop in zip(
                    batch.place_B2[i],
                    (image.shape[-1], image.shape[-2]),
                    (width, height),
                    strict=True,
                )
            )
            crop = image[..., top : top + height, left : left + width]
            flip = batch.flip_B[i]
            if self.vae_pixels and as_bytes:
                write_bytes(crop, flip, pixels[i])
            elif self.vae_pixels:
                write_vae(crop, flip, pixels[i])
            if batch.has_image_B[i]:
                self._write_vit(crop, flip, vit_pixels_IHWC[places_I[i]])

        return _Work([threads.submit(finish, i) for i in range(num)], [pixels, vit_pixels_IHWC])

    def _pipeline(self, inputs: Iterator[tuple[Any, ...]]) -> Pipeline:
        cuda = self.device.type == "cuda"
        device = "gpu" if cuda else "cpu"
        cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True, "device": device}
        index = (
            self.device.index
            if self.device.index is not None
            else (torch.cuda.current_device() if cuda else None)
        )
        pipe = Pipeline(
            batch_size=self.batch_size,
            num_threads=self.num_threads,
            device_id=index,
            prefetch_queue_depth=self.prefetch,
        )
        with pipe:
            encoded, *rest = fn.external_source(
                source=lambda: next(inputs),
                num_outputs=self._num_inputs,
                batch=True,
                ndim=[1] * self._num_inputs,
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32][: self._num_inputs],
            )
            options = (
                {"device": "mixed", "hw_decoder_load": self.hw_decoder_load}
                if cuda
                else {"device": "cpu"}
            )
            images = fn.decoders.image(encoded, output_type=types.RGB, **options)
            if self.resize_by_torch:
                pipe.set_outputs(images)
                return pipe
            place, size, *flip = rest
            flip = fn.reshape(flip[0], shape=[]) if flip else None
            images = fn.resize(images, size=size, mode="not_smaller", subpixel_scale=False, **cubic)
            images = fn.crop(
                images,
                crop=size,
                crop_pos_x=place[0],
                crop_pos_y=place[1],
                rounding="truncate",
                device=device,
            )
            outputs = []
            if self.vae_pixels:
                # HWC bytes to CHW float32 in [-1, 1], mirrored where flip is 1.
                outputs.append(
                    fn.crop_mirror_normalize(
                        images,
                        mirror=flip,
                        mean=[MID_GREY] * 3,
                        std=[MID_GREY] * 3,
                        dtype=types.FLOAT,
                        output_layout="CHW",
                        device=device,
                    )
                )
            if cuda:
                images = fn.resize(images, size=[self.vit_px, self.vit_px], **cubic)
                images = fn.flip(images, horizontal=flip, device=device)
            outputs.append(images)
            pipe.set_outputs(*outputs)
        return pipe


def resized(image_1CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image of bytes to (height, width), cubic and antialiased.

    The channels stay last in memory, as DALI decodes them. That is torch's fast path.
    """
    if tuple(image_1CHW.shape[-2:]) == tuple(size):
        return image_1CHW
    return torch.nn.functional.interpolate(image_1CHW, size=size, mode="bicubic", antialias=True)


def send(host: Tensor, device: torch.device) -> Tensor:
    """Queue the copy of a tensor to a device on the current stream.

    The host does not wait for it. Memory that is not pinned is copied to pinned memory first.
    """
    if device.type == "cuda" and not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def scaled(bytes_BHWC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes as pixels (B, 3, H, W) in [-1, 1].

    The result is bitwise equal to that of `write_vae` on any device.
    """
    pixels = bytes_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.sub_(MID_GREY).mul_(INVERSE_GREY).to(dtype)


def write_bytes(image_1CHW: Tensor, flip: bool, out_HWC: Tensor) -> None:
    """Mirror bytes if `flip`, and write them to out_HWC."""
    pixels = image_1CHW[0].flip(-1) if flip else image_1CHW[0]
    out_HWC.copy_(pixels.permute(1, 2, 0))


def write_vae(image_1CHW: Tensor, flip: bool, out_CHW: Tensor) -> None:
    """Scale bytes to [-1, 1], mirror them if `flip`, and write them to out_CHW.

    The result is bitwise equal to that of DALI's crop_mirror_normalize.
    """
    pixels = image_1CHW[0].to(torch.float32, memory_format=torch.contiguous_format).sub_(MID_GREY)
    pixels = pixels.mul_(INVERSE_GREY)
    out_CHW.copy_(pixels.flip(-1) if flip else pixels)


def upright(data: bytes) -> np.ndarray:
    """Decode an image with Pillow to upright HWC bytes, the same as DALI's. Raises DecodeError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(rgb(ImageOps.exif_transpose(image)))
    except Exception as error:
        # Pillow's parsers raise OSError, SyntaxError, struct.error, ValueError and more.
        raise DecodeError(f"{type(error).__name__}: {error}") from None


def as_trained(data: bytes) -> Image.Image:
    """Decode an image of any size to RGB as training sees it: upright, and on white if transparent.

    Raises:
        Rejected: it is not an image that training would take.
    """
    info = check_image(data, min_size_px=1, max_aspect=math.inf)
    return Image.fromarray(upright(on_white(data) if info.transparent else data))


def rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB.

    16-bit grey keeps its upper 8 bits, where Pillow would clip it. An alpha channel is dropped.
    """
    if image.mode.startswith("I"):
        return Image.fromarray(
            (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    return image.convert("RGB")


def decoded_sizes(images: list[bytes]) -> list[tuple[int, int] | None]:
    """Return (height, width), upright, of each image as DALI decodes it, or None if it cannot.

    Images are decoded one by one on the CPU. For errors and checks.
    """
    if fn is None:
        return [_size_by_pillow(image) for image in images]
    sizes = []
    while len(sizes) < len(images):
        # After an error a pipeline refuses all further images, so a new one is needed.
        sizes += _sizes_until_error(images[len(sizes) :])
    return sizes


def _size_by_pillow(data: bytes) -> tuple[int, int] | None:
    try:
        return upright(data).shape[:2]
    except DecodeError:
        return None


def _sizes_until_error(images: list[bytes]) -> list[tuple[int, int] | None]:
    """Return the sizes up to the first image that DALI refuses. It is included, as None."""
    remaining = iter(images)
    pipe = Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    with pipe:
        encoded = fn.external_source(
            source=lambda: [np.frombuffer(next(remaining), dtype=np.uint8)],
            batch=True,
            dtype=types.UINT8,
            ndim=1,
        )
        pipe.set_outputs(fn.decoders.image(encoded, output_type=types.RGB).shape())
    pipe.build()
    sizes = []
    try:
        while len(sizes) < len(images):
            height, width, _ = np.asarray(pipe.run()[0].at(0)).tolist()
            sizes.append((height, width))
    except RuntimeError:
        sizes.append(None)
    return sizes
