"""DALI graph: encoded images -> VAE pixels and ViT pixels. The only file that knows DALI, and what stands in for it."""

import io
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

try:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline
except ImportError:
    # no wheel for this machine: Pillow decodes, and `iomm doctor` says so
    fn = types = Pipeline = None

from iomm.config import InputError, choice

CENTRE = 0.5
# Grey level that is 0 in [-1, 1]
LEVEL = 127.5


class DecodeError(Exception):
    """An image of the batch that is due cannot be decoded. DALI does not always say which one."""


@dataclass(frozen=True)
class Encoded:
    """A batch as the decoder takes it. place_B2: where the crop lies in what is left of each axis, (x, y) in [0, 1]."""

    # Of bytes
    images: list
    # bool: mirrored left to right
    flip_B: np.ndarray
    # float32
    place_B2: np.ndarray
    # bool: the ViT looks at it
    has_image_B: np.ndarray
    # (height, width) of the VAE's pixels, of the whole batch
    size_px: tuple


class Decoder:
    """Decodes batches of images in threads of its own, `prefetch` batches ahead of whoever reads them.

    batches: iterable of Encoded, of at most batch_size images each. Iterating yields, in the same order, (pixels_BCHW,
    vit_pixels_IHWC) on `device`, in memory of their own: RGB in [-1, 1] at size_px in `dtype` (None unless
    `vae_pixels`), and of the I samples with has_image_B RGB bytes at vit_px x vit_px, which MLLM.vit_states normalises. An image is resized until it just covers size_px (cubic, antialiased), cropped at its place, and a flipped
    sample is mirrored; the ViT sees that very crop, resized to its square (cubic, antialiased). EXIF orientation is
    applied; grey, CMYK and 16-bit images become 8-bit RGB; an alpha channel is dropped. On CUDA nvJPEG decodes, the
    share hw_decoder_load of baseline JPEGs in hardware. Nothing is read beyond the end of `batches`, and an error
    raised by it is raised here. An image that DALI refuses costs the whole batch and the pipeline: DecodeError, when
    that batch is due. resize="torch" leaves only the JPEG to DALI where the device is a CPU, and gives the rest to torch's
    vectorised resize of bytes: 1.0 ms of CPU for a photograph to 512 px where DALI takes 7.5, within half a grey level
    of it. On CUDA it changes nothing. Without DALI Pillow decodes on the CPU, in num_threads threads, and torch resizes.
    """

    def __init__(
        self,
        batch_size,
        vit_px,
        device,
        num_threads=2,
        prefetch=2,
        *,
        dtype=torch.float32,
        vae_pixels=True,
        hw_decoder_load=0.65,
        resize="torch",
    ):
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
            print(
                "DALI is missing: Pillow decodes and torch resizes images, on the CPU (iomm doctor)",
                flush=True,
            )
        self.by_torch = fn is not None and resize == "torch" and self.device.type == "cpu"
        # of images, places, sizes, flips: DALI warns of those it does not use
        self._num_inputs = (
            1 if self.by_torch else 4 if vae_pixels or self.device.type == "cuda" else 3
        )
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, batches):
        """Iterator of (pixels_BCHW, vit_pixels_IHWC) over `batches`; owns a DALI pipeline and frees it at its end."""
        # They start when there is work.
        threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix="resize")
        if fn is None:
            yield from self._by_pillow(batches, threads)
            return
        # The batches that DALI has taken and not given back.
        taken = []
        pipe = self._pipeline(self._inputs(batches, taken))
        pipe.build()
        try:
            while True:
                try:
                    outputs = pipe.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    # DALI's text is all that tells its errors apart
                    if "fn.decoders.image" not in str(error):
                        raise
                    raise DecodeError(str(error)) from None
                if self.by_torch:
                    images = [np.asarray(outputs[0].at(i)) for i in range(len(taken[0].images))]
                    yield self._by_torch(images, taken.pop(0), threads)
                else:
                    yield self._finish(outputs, taken.pop(0))
        finally:
            threads.shutdown(cancel_futures=True)
            del pipe

    def _by_pillow(self, batches, threads):
        """__call__ without DALI."""
        waiting, batches = deque(), iter(batches)
        try:
            while True:
                while len(waiting) <= self.prefetch and (batch := next(batches, None)) is not None:
                    waiting.append(
                        (batch, [threads.submit(upright, image) for image in batch.images])
                    )
                if not waiting:
                    return
                batch, images = waiting.popleft()
                outputs = self._by_torch([image.result() for image in images], batch, threads)
                yield tuple(
                    None if output is None else output.to(self.device) for output in outputs
                )
        finally:
            threads.shutdown(cancel_futures=True)

    def _inputs(self, batches, taken):
        """What DALI reads of each batch: images, places, sizes, and flips if it mirrors anything."""
        for batch in batches:
            taken.append(batch)
            yield (
                [np.frombuffer(image, dtype=np.uint8) for image in batch.images],
                np.asarray(batch.place_B2, dtype=np.float32),
                np.tile(np.asarray(batch.size_px, dtype=np.float32), (len(batch.images), 1)),
                np.asarray(batch.flip_B, dtype=np.int32).reshape(-1, 1),
            )[: self._num_inputs]

    def _finish(self, outputs, batch):
        """DALI's outputs -> tensors of torch's own."""
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
        # DALI reuses its buffers once `outputs` is dropped, and does not wait for torch's stream then; so the copies
        # are made on a side stream and waited for there, which does not wait for the training step that is queued.
        with torch.cuda.stream(self._copies):
            copies = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            copies[-1] = copies[-1][has_image_B.to(self.device)]
            copies = [
                copy.to(self.dtype if copy.is_floating_point() else copy.dtype, copy=True)
                for copy in copies
            ]
        self._copies.synchronize()
        for copy in copies:
            copy.record_stream(torch.cuda.current_stream(self.device))
        return copies[0] if self.vae_pixels else None, copies[-1]

    def _vit_pixels(self, crops_IHWC, flip_I):
        """On the CPU: torch's resize of bytes is Pillow's, vectorised: 1.6 ms from 512 to 448 px where DALI takes 20."""
        out = self._vit_bytes(len(crops_IHWC))
        for pixels, crop, flip in zip(out, crops_IHWC, flip_I.tolist()):
            self._write_vit(crop.permute(2, 0, 1)[None], flip, pixels)
        return out

    def _vit_bytes(self, num_images):
        return torch.empty((num_images, self.vit_px, self.vit_px, 3), dtype=torch.uint8)

    def _write_vit(self, crop_1CHW, flip, out_HWC):
        """Bytes, resized for the ViT, mirrored if flip, into out_HWC."""
        pixels = resized(crop_1CHW, (self.vit_px, self.vit_px))[0]
        out_HWC.copy_((pixels.flip(-1) if flip else pixels).permute(1, 2, 0))

    def _by_torch(self, images, batch, threads):
        """Decoded images (HWC bytes, of any size) -> both outputs; one image per thread and turn."""
        height, width = batch.size_px
        pixels_BCHW = (
            torch.empty((len(batch.images), 3, height, width), dtype=self.dtype)
            if self.vae_pixels
            else None
        )
        places_I = np.cumsum(batch.has_image_B) - 1
        vit_pixels_IHWC = self._vit_bytes(int(np.sum(batch.has_image_B)))

        def finish(i):
            image = torch.from_numpy(images[i]).permute(2, 0, 1)[None]
            scale = max(height / image.shape[-2], width / image.shape[-1])
            image = resized(
                image,
                tuple(
                    max(round(side * scale), least)
                    for side, least in zip(image.shape[-2:], (height, width))
                ),
            )
            left, top = (
                int(float(at) * (side - crop))
                for at, side, crop in zip(
                    batch.place_B2[i], (image.shape[-1], image.shape[-2]), (width, height)
                )
            )
            crop = image[..., top : top + height, left : left + width]
            if self.vae_pixels:
                write_vae(crop, batch.flip_B[i], pixels_BCHW[i])
            if batch.has_image_B[i]:
                self._write_vit(crop, batch.flip_B[i], vit_pixels_IHWC[places_I[i]])

        list(threads.map(finish, range(len(batch.images))))
        return pixels_BCHW, vit_pixels_IHWC

    def _pipeline(self, inputs):
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
            if self.by_torch:
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
                # HWC bytes -> CHW float32 in [-1, 1], mirrored where flip is 1.
                outputs.append(
                    fn.crop_mirror_normalize(
                        images,
                        mirror=flip,
                        mean=[LEVEL] * 3,
                        std=[LEVEL] * 3,
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


def resized(image_1CHW, size):
    """Bytes to bytes, cubic and antialiased; channels last, as DALI decodes, is torch's fast path and stays."""
    if tuple(image_1CHW.shape[-2:]) == tuple(size):
        return image_1CHW
    return torch.nn.functional.interpolate(image_1CHW, size=size, mode="bicubic", antialias=True)


def write_vae(image_1CHW, flip, out_CHW):
    """Bytes -> [-1, 1], mirrored if flip, into out_CHW: to the bit what DALI's crop_mirror_normalize gives."""
    pixels = image_1CHW[0].to(torch.float32, memory_format=torch.contiguous_format).sub_(LEVEL)
    pixels = pixels.mul_(torch.tensor(1.0) / LEVEL)
    out_CHW.copy_(pixels.flip(-1) if flip else pixels)


def upright(data):
    """Encoded image -> HWC bytes by Pillow, as DALI gives them. Raises DecodeError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(rgb(ImageOps.exif_transpose(image)))
    except Exception as error:
        # Pillow's parsers raise OSError, SyntaxError, struct.error, ValueError and more
        raise DecodeError(f"{type(error).__name__}: {error}") from None


def rgb(image):
    """16-bit grey becomes 8 bits by its upper ones, where Pillow would cut off; alpha is dropped."""
    if image.mode.startswith("I"):
        return Image.fromarray(
            (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    return image.convert("RGB")


def size_by_pillow(data):
    try:
        return upright(data).shape[:2]
    except DecodeError:
        return None


def sizes(images):
    """(height, width), upright, that DALI sees of each image (bytes), or None where it cannot decode it. On the CPU, one
    by one: for errors and checks.
    """
    if fn is None:
        return [size_by_pillow(image) for image in images]
    found = []
    while len(found) < len(images):
        given = iter(images[len(found) :])
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
                source=lambda: [np.frombuffer(next(given), dtype=np.uint8)],
                batch=True,
                dtype=types.UINT8,
                ndim=1,
            )
            pipe.set_outputs(fn.decoders.image(encoded, output_type=types.RGB).shape())
        pipe.build()
        try:
            while len(found) < len(images):
                height, width, _ = np.asarray(pipe.run()[0].at(0)).tolist()
                found.append((height, width))
        except RuntimeError:
            # after an error a pipeline refuses everything
            found.append(None)
    return found
