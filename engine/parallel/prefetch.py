"""Encode the next micro-batch while the generator works on the current one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Self

import torch

from iomm.profiling import named


class Prefetcher:
    """Iterate over batches, each with `prepared` = prepare(*batch.inputs).

    fetch() reads and prepares the next batch. On a GPU this runs on a separate stream, concurrently
    with the work queued on the training stream; without a GPU it runs immediately. A batch that is
    requested before it was fetched is fetched on request.
    """

    def __init__(
        self, batches: Iterator[Any], prepare: Callable[..., Any], device: torch.device
    ) -> None:
        self.batches = batches
        self.prepare = prepare
        self.batch = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            # Copies of frozen weights may still be in flight.
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def fetch(self) -> None:
        """Queue the work on the next batch, if there is one."""
        # A stream of None has no effect.
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

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self.batch is None:
            self.fetch()
        batch, self.batch = self.batch, None
        if batch is None:
            raise StopIteration
        if self.stream is not None:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_stream(self.stream)
            # These may be freed while the training stream still reads them, so the allocator must
            # wait.
            for tensor in batch.prepared.tensors():
                tensor.record_stream(current)
        return batch
