"""VAE latents of centre crops, written once by `iomm cache` and read instead of pixels.

    DIR/latents.json              what they are of: index, VAE, size, dtype, shape; how many lie in a file
    DIR/latents-00000.safetensors entries [0, N) of the index: `latents` (N, C, h, w) and `crc32` of each (N,)

A file appears only when complete, so that a cache that was stopped, on any of its ranks, goes on where it was.
"""

import json
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from iomm.config import InputError, choice
from iomm.engine.data.archive import Tar
from iomm.engine.data.atomic import whole_file
from iomm.engine.data.index import records_crc32
from iomm.engine.data.samplers import SequentialSampler
from iomm.engine.data.shards import Damaged
from iomm.engine.data.source import ImageSource

HEADER, VERSION = "latents.json", 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Latents in a file: 128 MB of FLUX's at 512 px.
ROWS = 1024
# files
MAX_OPEN = 64
MAX_HEADER_BYTES = 1 << 16
# What is made for a ViT that does not look: as little as possible.
VIT_PX = 16


def facts_of(index, *, vae, size_px):
    """What decides the latents, and by which a cache is known: plain values for JSON."""
    return {
        "format": "iomm-latents",
        "version": VERSION,
        "vae": vae,
        "size_px": size_px,
        "num_samples": len(index.records),
        "index_crc32": records_crc32(index),
    }


def write_cache(
    shards,
    out,
    vae,
    *,
    vae_name,
    size_px,
    dtype="bf16",
    device="cpu",
    batch=32,
    num_threads=2,
    rank=0,
    num_ranks=1,
    progress=lambda num: None,
):
    """Encodes the samples of `shards` (Shards) into the folder `out`, files rank, rank + num_ranks, ... of it; returns
    how many samples this call wrote.

    The VAE lies on `device`; vae_name is by what training knows it. What is already there stays. A sample that cannot be had gets zeros and a checksum that does not fit, so that
    training replaces it. Raises InputError if `out` is a cache of something else.
    """
    choice("--dtype", dtype, tuple(DTYPES))
    out = Path(out)
    # Raises if the size does not divide.
    vae.grid(size_px, size_px)
    shape = [vae.channels, size_px // vae.factor, size_px // vae.factor]
    header = facts_of(shards.index, vae=vae_name, size_px=size_px) | {
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


class LatentStore:
    """Latents by index entry, each checked by its CRC-32. Safe to read from several threads.

    Raises InputError if `folder` is not a complete cache of this index, VAE and size; `read` raises Damaged. Files are
    read with pread, so that one that shrinks is Damaged, not a bus error.
    """

    def __init__(self, folder, index, *, vae, size_px):
        self.folder = Path(folder)
        header = check(folder, **facts_of(index, vae=vae, size_px=size_px))
        self.shape, self.rows, self.dtype = (
            tuple(header["shape"]),
            header["rows"],
            DTYPES[header["dtype"]],
        )
        self.row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        num_files = -(-len(index.records) // self.rows)
        missing = [i for i in range(num_files) if not (self.folder / _file_name(i)).is_file()]
        if missing:
            raise InputError(
                f"data.latents: {folder} lacks {len(missing)} of {num_files} files, {_file_name(missing[0])} "
                "first: run the same `iomm cache` again, it goes on where it was"
            )
        self._open, self._lock = OrderedDict(), threading.Lock()

    def read(self, k):
        """Latents (C, h, w) of entry k, in the dtype they are kept in."""
        number, row = divmod(int(k), self.rows)
        path = self.folder / _file_name(number)
        try:
            file, start, crc32 = self._file(number)
            data = file.read(start + row * self.row_bytes, self.row_bytes)
            if len(data) == self.row_bytes and zlib.crc32(data) == crc32[row]:
                return torch.frombuffer(bytearray(data), dtype=self.dtype).view(self.shape)
            problem = "its bytes are not those that were written"
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            problem = f"cannot be read: {error}"
        raise Damaged(f"{path}: latents {row}: {problem}")

    def zeros(self):
        return torch.zeros(self.shape, dtype=self.dtype)

    def _file(self, number):
        """(open file, where the latents start, crc32 of each)."""
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
                self._open[number] = file, 8 + num_bytes + start, crc32
                while len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]


class EncodedSamples:
    """Latents of all samples and image tokens of all images, encoded once by all ranks together and kept in memory.

    Both are pure functions of an image's centre crop, so a small data set that is seen many times is encoded once instead
    of in every epoch. The same methods as a LatentStore, and `tokens`. Memory: N (C h w + P D) numbers of the encoders'
    dtypes, on every rank. A sample that cannot be read is Damaged whenever it is due, and training replaces it.
    """

    def __init__(self, shards, mllm, vae, *, size_px, ranks, num_threads=2, batch=32):
        images, pairs = (
            (shards.images, shards.pairs) if hasattr(shards, "pairs") else (shards, None)
        )
        self.num_images = 0 if images is None else len(images)
        mine = {}
        for first, last, is_pair in (
            (0, self.num_images, False),
            (self.num_images, len(shards), True),
        ):
            entries = np.array_split(np.arange(first, last), ranks.size)[ranks.rank]
            mine[is_pair] = self._encode(
                shards, entries, is_pair, mllm, vae, size_px, num_threads, batch
            )
        parts = ranks.all(mine)
        self.latents_NCHW = torch.cat(
            [part[is_pair][0] for is_pair in (False, True) for part in parts]
        )
        self.tokens_IPD = torch.cat([part[False][1] for part in parts])
        self.bad = {k for part in parts for _, _, bad in part.values() for k in bad}

    @staticmethod
    def _encode(shards, entries, is_pair, mllm, vae, size_px, num_threads, batch):
        """-> (latents (n, C, h, w), image tokens (n, P, D), empty of pairs; entries that cannot be read), on the CPU."""
        shape = vae.channels, size_px // vae.factor, size_px // vae.factor
        latents, tokens, bad = (
            [torch.empty(0, *shape)],
            [torch.empty(0, mllm.num_image_tokens, mllm.width, dtype=mllm.dtype)],
            [],
        )
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
            for one in source:
                bad += [
                    int(entries[failure.n]) for failure in one.failures if failure.n < len(entries)
                ]
                latents.append(vae.encode(one.pixels_BCHW).cpu())
                if not is_pair:
                    tokens.append(mllm.image_tokens(one.vit_pixels_BHWC).cpu())
        return torch.cat(latents)[: len(entries)], torch.cat(tokens)[: len(entries)], bad

    @property
    def num_bytes(self):
        return sum(x.numel() * x.itemsize for x in (self.latents_NCHW, self.tokens_IPD))

    def read(self, k):
        """Latents (C, h, w) of entry k. Raises Damaged."""
        if k in self.bad:
            raise Damaged(
                f"sample {k} could not be read when the samples were encoded at the start"
            )
        return self.latents_NCHW[k]

    def tokens(self, entries):
        """Entries of images -> their tokens (I, P, D)."""
        return self.tokens_IPD[entries]

    def zeros(self):
        return torch.zeros_like(self.latents_NCHW[0])


def _encode(shards, entries, encode, size_px, dtype, device, batch, num_threads, progress):
    """(latents of the entries on the CPU, indices of those that could not be had)."""
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
    latents, bad = [], []
    for one in source:
        bad += [failure.n for failure in one.failures if failure.n < len(entries)]
        with torch.no_grad():
            latents.append(encode(one.pixels_BCHW).to(dtype).cpu())
        progress(min(batch, len(entries) - batch * (len(latents) - 1)))
    latents = torch.cat(latents)[: len(entries)]
    latents[bad] = 0
    return latents, bad


def _bytes(row):
    return row.contiguous().view(torch.uint8).numpy().tobytes()


def _file_name(number):
    return f"latents-{number:05d}.safetensors"


def check(folder, **wanted):
    """The header of a cache. Raises InputError if there is none, or if it differs in one of these facts."""
    header = _read_header(Path(folder))
    if header is None:
        raise InputError(f"data.latents: {folder} has no {HEADER}: make it with `iomm cache`")
    different = [
        f"{key} is {header.get(key)!r}, wanted {value!r}"
        for key, value in wanted.items()
        if header.get(key) != value
    ]
    if different:
        raise InputError(
            f"data.latents: {folder} is of something else ({'; '.join(different)}): run `iomm cache` again"
        )
    return header


def _read_header(folder):
    try:
        return json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _claim(out, header):
    """Writes the header into a new folder; one that is there must be the same."""
    out.mkdir(parents=True, exist_ok=True)
    there = _read_header(out)
    if there is None:
        if any(
            file.name != HEADER and not file.name.startswith(f".{HEADER}") for file in out.iterdir()
        ):
            raise InputError(
                f"{out} holds something else (it has no {HEADER}): give another folder or empty it"
            )
        # Ranks write the same.
        with whole_file(out / HEADER) as partial:
            partial.write_text(json.dumps(header, indent=1), encoding="utf-8")
    elif there != header:
        different = [
            f"{key} {there.get(key)!r} became {header.get(key)!r}"
            for key in header
            if there.get(key) != header.get(key)
        ]
        raise InputError(
            f"{out} is a cache of something else ({'; '.join(different)}): give another folder or remove it"
        )
