"""The encoders of the next micro-batch, while the generator works on the one before."""

from dataclasses import replace

import torch

from iomm.profiling import named


class Prefetcher:
    """Yields the batches of an iterator, each with `prepared` = prepare(*batch.inputs).

    fetch() does that for the next one: on a GPU on a stream of its own, beside whatever is queued on the training stream;
    without one, at once. A batch that is asked for before it was fetched is fetched then.
    """

    def __init__(self, batches, prepare, device):
        self.batches, self.prepare, self.batch = batches, prepare, None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            # Frozen weights may still be on their way.
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def fetch(self):
        """Queues the work on the next batch, if there is one. The host waits for the side stream where lengths are read."""
        # of None: no effect
        with torch.cuda.stream(self.stream):
            with named("data"):
                batch = next(self.batches, None)
            # Pixels are dropped as soon as they are encoded.
            if batch is not None:
                self.batch = replace(
                    batch,
                    prepared=self.prepare(*batch.inputs),
                    pixels_BCHW=None,
                    vit_pixels_BHWC=None,
                    latents_BCHW=None,
                    image_tokens_IPD=None,
                )

    def __iter__(self):
        return self

    def __next__(self):
        if self.batch is None:
            self.fetch()
        batch, self.batch = self.batch, None
        if batch is None:
            raise StopIteration
        if self.stream is not None:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_stream(self.stream)
            # Freed while the training stream may still read it: the allocator waits.
            for tensor in batch.prepared.tensors():
                tensor.record_stream(current)
        return batch
