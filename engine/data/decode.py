"""DALI graph: encoded images -> VAE pixels and ViT pixels. The only file that knows DALI."""

from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from iomm.config import InputError

IMAGENET_MEAN = 0.485, 0.456, 0.406
IMAGENET_STD = 0.229, 0.224, 0.225
CENTRE = 0.5


class DecodeError(Exception):
    """DALI refuses an image of the batch that is due. It does not always say which one."""


@dataclass(frozen=True)
class Encoded:
    """A batch as the decoder takes it. place_B2: where the crop lies in what is left of each axis, (x, y) in [0, 1]."""

    images: list                   # of bytes
    flip_B: np.ndarray             # bool: mirrored left to right
    place_B2: np.ndarray           # float32
    has_image_B: np.ndarray        # bool: the ViT looks at it
    size_px: tuple                 # (height, width) of the VAE's pixels, of the whole batch


class Decoder:
    """Decodes batches of images in threads of its own, `prefetch` batches ahead of whoever reads them.

    batches: iterable of Encoded, of at most batch_size images each. Iterating yields, in the same order, (pixels_BCHW,
    vit_pixels_ICHW) in `dtype` on `device`, in memory of their own: RGB in [-1, 1] at size_px (None unless
    `vae_pixels`), and of the I samples with has_image_B RGB normalised with ImageNet's mean and deviation at vit_px x
    vit_px. An image is resized until it just covers size_px (cubic, antialiased), cropped at its place, and a flipped
    sample is mirrored; the ViT sees that very crop, resized to its square (cubic, antialiased). EXIF orientation is
    applied; grey, CMYK and 16-bit images become 8-bit RGB; an alpha channel is dropped. On CUDA nvJPEG decodes, the
    share hw_decoder_load of baseline JPEGs in hardware. Nothing is read beyond the end of `batches`, and an error
    raised by it is raised here. An image that DALI refuses costs the whole batch and the pipeline: DecodeError, when
    that batch is due.
    """

    def __init__(self, batch_size, vit_px, device, num_threads=2, prefetch=2, *, dtype=torch.float32, vae_pixels=True,
                 hw_decoder_load=0.65):
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
        self._num_inputs = 4 if vae_pixels or self.device.type == "cuda" else 3      # DALI warns of those it does not use
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, batches):
        """Iterator of (pixels_BCHW, vit_pixels_ICHW) over `batches`; owns a DALI pipeline and frees it at its end."""
        taken = []      # of the batches that DALI has taken and not given back: flips and who has an image
        pipe = self._pipeline(self._inputs(batches, taken))
        pipe.build()
        try:
            while True:
                try:
                    outputs = pipe.run()
                except StopIteration:
                    return
                except RuntimeError as error:      # DALI's text is all that tells its errors apart
                    if "fn.decoders.image" not in str(error):
                        raise
                    raise DecodeError(str(error)) from None
                yield self._finish(outputs, *taken.pop(0))
        finally:
            del pipe

    def _inputs(self, batches, taken):
        """What DALI reads of each batch: images, places, sizes, and flips if it mirrors anything."""
        for batch in batches:
            flips = np.asarray(batch.flip_B, dtype=np.int32).reshape(-1, 1)
            has_image_B = torch.as_tensor(np.asarray(batch.has_image_B, dtype=bool))
            taken.append((torch.from_numpy(flips.reshape(-1) > 0), has_image_B))
            yield ([np.frombuffer(image, dtype=np.uint8) for image in batch.images],
                   np.asarray(batch.place_B2, dtype=np.float32),
                   np.tile(np.asarray(batch.size_px, dtype=np.float32), (len(batch.images), 1)),
                   flips)[:self._num_inputs]

    def _finish(self, outputs, flip_B, has_image_B):
        """DALI's outputs -> tensors of torch's own."""
        if self.device.type != "cuda":
            crops_BHWC = torch.from_dlpack(outputs[-1].as_tensor())
            pixels_BCHW = torch.from_dlpack(outputs[0].as_tensor()).to(self.dtype, copy=True) if self.vae_pixels else None
            return pixels_BCHW, self._vit_pixels(crops_BHWC[has_image_B], flip_B[has_image_B])
        # DALI reuses its buffers once `outputs` is dropped, and does not wait for torch's stream then; so the copies
        # are made on a side stream and waited for there, which does not wait for the training step that is queued.
        with torch.cuda.stream(self._copies):
            copies = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            copies[-1] = copies[-1][has_image_B.to(self.device)]
            copies = [copy.to(self.dtype, copy=True) for copy in copies]
        self._copies.synchronize()
        for copy in copies:
            copy.record_stream(torch.cuda.current_stream(self.device))
        return copies[0] if self.vae_pixels else None, copies[-1]

    def _vit_pixels(self, crops_IHWC, flip_I):
        """On the CPU: torch's resize of bytes is Pillow's, vectorised: 1.6 ms from 512 to 448 px where DALI takes 20."""
        crops_ICHW = crops_IHWC.permute(0, 3, 1, 2)      # channels last stays: the fast path of torch.interpolate
        size = (self.vit_px, self.vit_px)
        if crops_ICHW.shape[-2:] != size and len(crops_ICHW):
            crops_ICHW = torch.nn.functional.interpolate(crops_ICHW, size=size, mode="bicubic", antialias=True)
        mean, inverse_std = (torch.tensor([255 * level for level in levels]).view(3, 1, 1)
                             for levels in (IMAGENET_MEAN, IMAGENET_STD))
        inverse_std = 1 / inverse_std
        out = torch.empty((len(crops_ICHW), 3, *size), dtype=self.dtype)
        for i, flip in enumerate(flip_I.tolist()):      # one image stays in the cache
            levels = crops_ICHW[i].to(torch.float32, memory_format=torch.contiguous_format)
            pixels = levels.sub_(mean).mul_(inverse_std)      # to the bit what DALI computes
            out[i] = pixels.flip(-1) if flip else pixels
        return out

    def _pipeline(self, inputs):
        cuda = self.device.type == "cuda"
        device = "gpu" if cuda else "cpu"
        cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True, "device": device}
        index = self.device.index if self.device.index is not None else (torch.cuda.current_device() if cuda else None)
        pipe = Pipeline(batch_size=self.batch_size, num_threads=self.num_threads, device_id=index,
                        prefetch_queue_depth=self.prefetch)
        with pipe:
            encoded, place, size, *flip = fn.external_source(
                source=lambda: next(inputs), num_outputs=self._num_inputs, batch=True, ndim=[1] * self._num_inputs,
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32][:self._num_inputs])
            flip = fn.reshape(flip[0], shape=[]) if flip else None
            options = {"device": "mixed", "hw_decoder_load": self.hw_decoder_load} if cuda else {"device": "cpu"}
            images = fn.decoders.image(encoded, output_type=types.RGB, **options)
            images = fn.resize(images, size=size, mode="not_smaller", subpixel_scale=False, **cubic)
            images = fn.crop(images, crop=size, crop_pos_x=place[0], crop_pos_y=place[1], rounding="truncate",
                             device=device)
            outputs = [_normalise(images, flip, (0.5,) * 3, (0.5,) * 3, device)] if self.vae_pixels else []
            if cuda:
                vit_images = fn.resize(images, size=[self.vit_px, self.vit_px], **cubic)
                outputs.append(_normalise(vit_images, flip, IMAGENET_MEAN, IMAGENET_STD, device))
            else:
                outputs.append(images)
            pipe.set_outputs(*outputs)
        return pipe


def _normalise(images, flip, mean, std, device):
    """HWC bytes -> CHW float32 (x / 255 - mean) / std, mirrored where flip is 1."""
    return fn.crop_mirror_normalize(images, mirror=flip, mean=[255 * m for m in mean], std=[255 * s for s in std],
                                    dtype=types.FLOAT, output_layout="CHW", device=device)


def sizes(images):
    """(height, width), upright, that DALI sees of each image (bytes), or None where it cannot decode it. On the CPU, one
    by one: for errors and checks."""
    found = []
    while len(found) < len(images):
        given = iter(images[len(found):])
        pipe = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_async=False,
                        exec_pipelined=False)
        with pipe:
            encoded = fn.external_source(source=lambda: [np.frombuffer(next(given), dtype=np.uint8)], batch=True,
                                         dtype=types.UINT8, ndim=1)
            pipe.set_outputs(fn.decoders.image(encoded, output_type=types.RGB).shape())
        pipe.build()
        try:
            while len(found) < len(images):
                height, width, _ = np.asarray(pipe.run()[0].at(0)).tolist()
                found.append((height, width))
        except RuntimeError:      # after an error a pipeline refuses everything
            found.append(None)
    return found
