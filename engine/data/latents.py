"""VAE latents of centre crops, written once by `iomm cache` and read in place of pixels.

    DIR/latents.json              index, VAE, size, dtype and shape; number of latents in a file
    DIR/latents-00000.safetensors entries [0, N) of the index: `latents` (N, C, h, w) and `crc32`
                                  of each (N,)

A file appears only when complete. A cache that was stopped, on any of its ranks, therefore resumes
where it was.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from iomm.config import InputError, choice
from iomm.engine.config import same
from iomm.engine.data.archive import Tar
from iomm.engine.data.atomic import whole_file
from iomm.engine.data.index import Index, records_crc32
from iomm.engine.data.mixture import Joined
from iomm.engine.data.samplers import SequentialSampler
from iomm.engine.data.shards import Damaged, Shards
from iomm.engine.data.source import ImageSource

if TYPE_CHECKING:
    from iomm.mllm import MLLM
    from iomm.vae import Latents

HEADER = "latents.json"
VERSION = 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Latents in a file. 128 MB for FLUX's VAE at 512 px.
ROWS = 1024
# Open files.
MAX_OPEN = 64
MAX_HEADER_BYTES = 1 << 16
# The ViT pixels are not used when a cache is written, so they are as small as possible.
VIT_PX = 16


def cache_facts(index: Index, *, vae: str, size_px: int) -> dict[str, Any]:
    """Return the values that determine the latents and identify a cache, for JSON."""
    return {
        "format": "iomm-latents",
        "version": VERSION,
        "vae": vae,
        "size_px": size_px,
        "num_samples": len(index.records),
        "index_crc32": records_crc32(index),
    }


def write_cache(
    shards: Shards,
    out: str | os.PathLike,
    vae: Latents,
    *,
    vae_name: str,
    size_px: int,
    dtype: str = "bf16",
    device: torch.device | str = "cpu",
    batch: int = 32,
    num_threads: int = 2,
    rank: int = 0,
    num_ranks: int = 1,
    progress: Callable[[int], None] = lambda num: None,
) -> int:
    """Encode the samples of `shards` into the folder `out`. Return the number written by this call.

    Existing files are kept. An unreadable sample gets zeros and a wrong checksum, so training
    replaces it.

    Args:
        shards: the samples.
        out: folder of the cache.
        vae: the VAE, on `device`.
        vae_name: name of the VAE in the training config.
        size_px: side of the crops.
        dtype: "bf16" or "fp16".
        device: where to encode.
        batch: samples encoded at a time.
        num_threads: CPU threads that decode and resize.
        rank: this process writes files rank, rank + num_ranks, ...
        num_ranks: number of processes that share the work.
        progress: called with the number of samples that were encoded.

    Raises:
        InputError: `out` is a cache made with different settings, or holds other files.
    """
    choice("--dtype", dtype, tuple(DTYPES))
    out = Path(out)
    # Raises InputError if size_px is not divisible.
    vae.grid(size_px, size_px)
    shape = [vae.channels, size_px // vae.factor, size_px // vae.factor]
    header = cache_facts(shards.index, vae=vae_name, size_px=size_px) | {
        "dtype": dtype,
        "shape": shape,
        "rows": ROWS,
    }
    _claim(out, header)
    num_written = 0
    for number in range(rank, -(-len(shards) // ROWS), num_ranks):
        path = out / _file_name(number)
        if path.exists():
            continue
        entries = range(number * ROWS, min((number + 1) * ROWS, len(shards)))
        latents, bad = _encode(
            shards,
            entries,
            vae.encode,
            size_px,
            DTYPES[dtype],
            device,
            batch,
            num_threads,
            progress,
        )
        crc32 = torch.tensor([zlib.crc32(_bytes(row)) for row in latents], dtype=torch.int64)
        crc32[bad] ^= 1
        with whole_file(path, durable=True) as partial:
            partial.write_bytes(save({"latents": latents, "crc32": crc32}))
        num_written += len(entries)
    return num_written


class _OpenFile(NamedTuple):
    """An open file of a cache."""

    file: Tar
    # Offset of the first latents.
    start: int
    # int64, (rows,).
    crc32: np.ndarray


class LatentStore:
    """Latents by index entry, each checked by its CRC-32. Safe to read from several threads.

    Files are read with pread, so a file that shrinks raises Damaged and not a bus error.
    """

    def __init__(self, folder: str | os.PathLike, index: Index, *, vae: str, size_px: int) -> None:
        """Open a cache.

        Args:
            folder: folder of the cache.
            index: index of the samples.
            vae: name of the VAE in the training config.
            size_px: side of the crops.

        Raises:
            InputError: `folder` is not a complete cache of this index, VAE and size.
        """
        self.folder = Path(folder)
        header = check(folder, **cache_facts(index, vae=vae, size_px=size_px))
        self.shape = tuple(header["shape"])
        self.rows = header["rows"]
        self.dtype = DTYPES[header["dtype"]]
        self.row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        num_files = -(-len(index.records) // self.rows)
        missing = [i for i in range(num_files) if not (self.folder / _file_name(i)).is_file()]
        if missing:
            raise InputError(
                f"data.latents: {folder} lacks {len(missing)} of {num_files} files, the first is "
                f"{_file_name(missing[0])}; run the same `iomm cache` again to complete it"
            )
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, k: int) -> Tensor:
        """Return the latents (C, h, w) of entry k, in the dtype of the cache. Raises Damaged."""
        number, row = divmod(int(k), self.rows)
        path = self.folder / _file_name(number)
        try:
            file, start, crc32 = self._file(number)
            data = file.read(start + row * self.row_bytes, self.row_bytes)
            if len(data) == self.row_bytes and zlib.crc32(data) == crc32[row]:
                return torch.frombuffer(bytearray(data), dtype=self.dtype).view(self.shape)
            problem = "the bytes differ from those that were written"
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            problem = f"cannot be read: {error}"
        raise Damaged(f"{path}: latents {row}: {problem}")

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)

    def _file(self, number: int) -> _OpenFile:
        with self._lock:
            if number not in self._open:
                file = Tar(self.folder / _file_name(number))
                num_bytes = int.from_bytes(file.read(0, 8), "little")
                tensors = json.loads(file.read(8, min(num_bytes, MAX_HEADER_BYTES)))
                (crc_start, crc_end), (start, _) = (
                    tensors[name]["data_offsets"] for name in ("crc32", "latents")
                )
                crc32 = np.frombuffer(
                    file.read(8 + num_bytes + crc_start, crc_end - crc_start), dtype="<i8"
                )
                self._open[number] = _OpenFile(file, 8 + num_bytes + start, crc32)
                while len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]


class EncodedSamples:
    """Latents of all samples and image tokens of all images, kept in memory.

    All ranks together encode them once, when the run starts. Both are pure functions of an image's
    centre crop, so a small dataset that is seen many times is encoded once instead of in every
    epoch. The class has the methods of a LatentStore, and `tokens`.

    Memory is N (C h w + P D) numbers of the encoders' dtypes, on every rank. Reading an unreadable
    sample raises Damaged every time, and training replaces it.
    """

    def __init__(
        self,
        shards: Shards | Joined,
        mllm: MLLM,
        vae: Latents,
        *,
        size_px: int,
        ranks: Any,
        num_threads: int = 2,
        batch: int = 32,
    ) -> None:
        """Encode this rank's share of the samples and gather the others'.

        Args:
            shards: the samples: images, or images and pairs.
            mllm: encoder of image tokens.
            vae: encoder of latents.
            size_px: side of the crops.
            ranks: engine.parallel.ranks.Ranks. Its rank, size and all() are used.
            num_threads: CPU threads that decode and resize.
            batch: samples encoded at a time.
        """
        images = shards.images if hasattr(shards, "pairs") else shards
        self.num_images = 0 if images is None else len(images)
        share = {}
        for first, last, is_pair in (
            (0, self.num_images, False),
            (self.num_images, len(shards), True),
        ):
            entries = np.array_split(np.arange(first, last), ranks.size)[ranks.rank]
            share[is_pair] = self._encode(
                shards, entries, is_pair, mllm, vae, size_px, num_threads, batch
            )
        parts = ranks.all(share)
        self.latents_NCHW = torch.cat(
            [part[is_pair][0] for is_pair in (False, True) for part in parts]
        )
        self.tokens_IPD = torch.cat([part[False][1] for part in parts])
        self.bad = {k for part in parts for _, _, bad in part.values() for k in bad}

    @staticmethod
    def _encode(
        shards: Shards | Joined,
        entries: np.ndarray,
        is_pair: bool,
        mllm: MLLM,
        vae: Latents,
        size_px: int,
        num_threads: int,
        batch: int,
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Encode some entries, all images or all pairs.

        Returns:
            Latents (n, C, h, w) and image tokens (n, P, D), on the CPU, and the unreadable entries.
            There are no image tokens of pairs.
        """
        shape = vae.channels, size_px // vae.factor, size_px // vae.factor
        latents = [torch.empty(0, *shape)]
        tokens = [torch.empty(0, mllm.num_image_tokens, mllm.width, dtype=mllm.dtype)]
        bad = []
        if len(entries):
            batch = min(batch, len(entries))
            source = ImageSource(
                shards,
                seed=0,
                global_batch=batch,
                micro_batch=batch,
                rank=0,
                world_size=1,
                size_px=size_px,
                vit_px=mllm.vit_px,
                device=mllm.device,
                num_steps=-(-len(entries) // batch),
                num_threads=num_threads,
                sampler=SequentialSampler(entries, size_px, pairs=is_pair),
            )
            for decoded in source:
                bad += [
                    int(entries[failure.n])
                    for failure in decoded.failures
                    if failure.n < len(entries)
                ]
                latents.append(vae.encode(decoded.pixels_BCHW).cpu())
                if not is_pair:
                    tokens.append(mllm.image_tokens(decoded.vit_pixels_BHWC).cpu())
        return torch.cat(latents)[: len(entries)], torch.cat(tokens)[: len(entries)], bad

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.itemsize for x in (self.latents_NCHW, self.tokens_IPD))

    def read(self, k: int) -> Tensor:
        """Return the latents (C, h, w) of entry k. Raises Damaged."""
        if k in self.bad:
            raise Damaged(f"sample {k} was unreadable when the samples were encoded at the start")
        return self.latents_NCHW[k]

    def tokens(self, entries: list[int]) -> Tensor:
        """Return the tokens (I, P, D) of entries that are images."""
        return self.tokens_IPD[entries]

    def zeros(self) -> Tensor:
        return torch.zeros_like(self.latents_NCHW[0])


def _encode(
    shards: Shards,
    entries: range,
    encode: Callable[[Tensor], Tensor],
    size_px: int,
    dtype: torch.dtype,
    device: torch.device | str,
    batch: int,
    num_threads: int,
    progress: Callable[[int], None],
) -> tuple[Tensor, list[int]]:
    """Return the latents of `entries` on the CPU, and the indices of the unreadable ones."""
    batch = min(batch, len(shards))
    num_batches = -(-len(entries) // batch)
    source = ImageSource(
        shards,
        seed=0,
        global_batch=batch,
        micro_batch=batch,
        rank=0,
        world_size=1,
        size_px=size_px,
        vit_px=VIT_PX,
        device=torch.device(device),
        num_steps=num_batches,
        num_threads=num_threads,
        sampler=SequentialSampler(entries, size_px),
    )
    latents = []
    bad = []
    for decoded in source:
        bad += [failure.n for failure in decoded.failures if failure.n < len(entries)]
        with torch.no_grad():
            latents.append(encode(decoded.pixels_BCHW).to(dtype).cpu())
        progress(min(batch, len(entries) - batch * (len(latents) - 1)))
    latents = torch.cat(latents)[: len(entries)]
    latents[bad] = 0
    return latents, bad


def _bytes(row: Tensor) -> bytes:
    return row.contiguous().view(torch.uint8).numpy().tobytes()


def _file_name(number: int) -> str:
    return f"latents-{number:05d}.safetensors"


def check(folder: str | os.PathLike, **expected: Any) -> dict[str, Any]:
    """Return the header of a cache after comparing it with the expected values.

    Raises:
        InputError: there is no header, or one of its values differs.
    """
    header = _read_header(Path(folder))
    if header is None:
        raise InputError(f"data.latents: {folder} has no {HEADER}; create it with `iomm cache`")
    different = [
        f"{key} is {header.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if not same(value, header.get(key))
    ]
    if different:
        raise InputError(
            f"data.latents: {folder} was made with different settings ({'; '.join(different)}); "
            "run `iomm cache` again"
        )
    return header


def _read_header(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _claim(out: Path, header: dict[str, Any]) -> None:
    """Write the header into a new folder, or check that an existing header is the same."""
    out.mkdir(parents=True, exist_ok=True)
    existing = _read_header(out)
    if existing is None:
        if any(
            file.name != HEADER and not file.name.startswith(f".{HEADER}") for file in out.iterdir()
        ):
            raise InputError(
                f"{out} holds other files (no {HEADER}); choose another folder or empty it"
            )
        # All ranks write the same header.
        with whole_file(out / HEADER) as partial:
            partial.write_text(json.dumps(header, indent=1), encoding="utf-8")
        return
    different = [
        f"{key} is {existing.get(key)!r}, expected {header.get(key)!r}"
        for key in header
        if not same(header.get(key), existing.get(key))
    ]
    if different:
        raise InputError(
            f"{out} is a cache made with different settings ({'; '.join(different)}); choose "
            "another folder or remove it"
        )
