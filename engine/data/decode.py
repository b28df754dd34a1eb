"""DALI graph: encoded images -> VAE pixels and ViT pixels. The only file that knows DALI."""

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

IMAGENET_MEAN = 0.485, 0.456, 0.406
IMAGENET_STD = 0.229, 0.224, 0.225


class DecodeError(Exception):
    """DALI refuses an image of the batch that is due. It does not always say which one."""


class Decoder:
    """Decodes batches of images in threads of its own, `prefetch` batches ahead of whoever reads them.

    batches: iterable of (list of `batch_size` encoded images as bytes, bool array of flips). Iterating yields, in the
    same order, (pixels_BCHW, vit_pixels_BCHW), float32 on `device`, in memory of their own: RGB in [-1, 1] at size_px,
    and RGB normalised with ImageNet's mean and deviation at vit_px. The shorter edge is resized to size_px (cubic,
    antialiased), the centre is cropped, a flipped sample is mirrored left to right, and the ViT sees that very crop,
    resized. EXIF orientation is applied; grey, CMYK and 16-bit images become 8-bit RGB; an alpha channel is dropped. On
    CUDA nvJPEG decodes. Nothing is read beyond the end of `batches`, and an error raised by it is raised here. An image
    that DALI refuses costs the whole batch and the pipeline: DecodeError, when that batch is due.
    """

    def __init__(self, batch_size, size_px, vit_px, device, num_threads=2, prefetch=2):
        self.batch_size = batch_size
        self.size_px = size_px
        self.vit_px = vit_px
        self.device = torch.device(device)
        self.num_threads = num_threads
        self.prefetch = prefetch
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, batches):
        """Iterator of (pixels_BCHW, vit_pixels_BCHW) over `batches`; owns a DALI pipeline and frees it at its end."""
        pipe = self._pipeline(iter(batches))
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
                yield tuple(self._copy(output) for output in outputs)
        finally:
            del pipe

    def refuses(self, image):
        """Whether DALI cannot decode this image (bytes). Builds a CPU pipeline for it alone: for errors only."""
        try:
            list(Decoder(1, self.size_px, self.vit_px, "cpu", num_threads=1)([([image], [False])]))
        except DecodeError:
            return True
        return False

    def _copy(self, output):
        """A tensor of torch's own. DALI reuses its buffer once `output` is dropped, and does not wait for torch's
        stream then; so the copy is made on a side stream and waited for there, which does not wait for the training
        step that is queued."""
        if self.device.type != "cuda":
            return torch.from_dlpack(output.as_tensor()).clone()
        with torch.cuda.stream(self._copies):
            copy = torch.from_dlpack(output.as_tensor()).clone()
        self._copies.synchronize()
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy

    def _pipeline(self, batches):
        cuda = self.device.type == "cuda"
        device = "gpu" if cuda else "cpu"
        cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True, "device": device}

        def read():
            images, flips = next(batches)
            return ([np.frombuffer(image, dtype=np.uint8) for image in images],
                    np.asarray(flips, dtype=np.int32).reshape(-1, 1))

        index = self.device.index if self.device.index is not None else (torch.cuda.current_device() if cuda else None)
        pipe = Pipeline(batch_size=self.batch_size, num_threads=self.num_threads, device_id=index,
                        prefetch_queue_depth=self.prefetch)
        with pipe:
            encoded, flip = fn.external_source(
                source=read, num_outputs=2, batch=True, dtype=[types.UINT8, types.INT32], ndim=[1, 1])
            flip = fn.reshape(flip, shape=[])
            images = fn.decoders.image(encoded, device="mixed" if cuda else "cpu", output_type=types.RGB)
            images = fn.resize(images, resize_shorter=self.size_px, subpixel_scale=False, **cubic)
            images = fn.crop(images, crop=[self.size_px, self.size_px], rounding="truncate", device=device)
            vit_images = fn.resize(images, size=[self.vit_px, self.vit_px], **cubic)
            pipe.set_outputs(_normalise(images, flip, (0.5,) * 3, (0.5,) * 3, device),
                             _normalise(vit_images, flip, IMAGENET_MEAN, IMAGENET_STD, device))
        return pipe


def _normalise(images, flip, mean, std, device):
    """HWC bytes -> CHW float32 (x / 255 - mean) / std, mirrored where flip is 1."""
    return fn.crop_mirror_normalize(images, mirror=flip, mean=[255 * m for m in mean], std=[255 * s for s in std],
                                    dtype=types.FLOAT, output_layout="CHW", device=device)
