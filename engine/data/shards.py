"""Read the image and caption of an index entry."""

import os
import threading
import zlib
from collections import OrderedDict

import numpy as np

from iomm.config import InputError
from iomm.engine.data.archive import Folder, Tar
from iomm.engine.data.caption import caption_of_json, caption_of_text
from iomm.engine.data.image import on_white
from iomm.engine.data.index import load
from iomm.engine.data.validate import CAPTION_JSON, CAPTION_TXT, TRANSPARENT, UNVERIFIED

# Open shards. A sampler draws from 16 at a time, and 1,024 file handles are a common limit.
MAX_OPEN = 256


class Damaged(InputError):
    """A sample that was good when it was indexed is unreadable now."""


class Shards:
    """The good samples of an index, by entry k in [0, len). Safe to read from several threads.

    Reading raises Damaged, which names shard and sample, where bytes differ from those that were
    indexed. Shards are read with pread, so a shard that shrinks while it is read raises Damaged and
    not a bus error. The index is memory-mapped. `iomm index` never writes to an existing one.
    """

    def __init__(self, index_dir: str | os.PathLike) -> None:
        """Load the index.

        Raises:
            InputError: the index is unreadable, or a shard has changed since it was built.
        """
        self.index = load(index_dir)
        self.shard_sizes = [shard["num_samples"] for shard in self.index.shards]
        self._shard_ends = np.cumsum(self.shard_sizes)
        self._open: OrderedDict[int, Folder | Tar] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.index.records)

    def image_bytes(self, k: int) -> bytes:
        """Return the encoded image as stored.

        Its CRC-32 is checked, unless the index was built with verify="fast".

        Raises:
            Damaged: the image is unreadable, or its bytes have changed.
        """
        record = self.index.records[k]
        data = self._read(k, record["image_offset"], record["image_bytes"])
        if not record["flags"] & UNVERIFIED and zlib.crc32(data) != record["crc32"]:
            raise self._damaged(
                k,
                "its bytes differ from those that were indexed; check the storage and run "
                "`iomm index` again",
            )
        return data

    def decodable_bytes(self, k: int) -> bytes:
        """Return the encoded image for the decoder: as stored, or on white if it is transparent.

        Raises:
            Damaged: see image_bytes.
        """
        data = self.image_bytes(k)
        if not self.index.records[k]["flags"] & TRANSPARENT:
            return data
        try:
            return on_white(data)
        except Exception as error:
            # Without a CRC the bytes are arbitrary, and Pillow's parsers raise many exceptions.
            raise self._damaged(k, f"cannot be decoded ({type(error).__name__}: {error})") from None

    def caption(self, k: int) -> str:
        """Return the caption, or "" if the sample has none. Its CRC-32 is checked.

        Raises:
            Damaged: the caption is unreadable, or its bytes have changed.
        """
        record = self.index.records[k]
        if not record["flags"] & (CAPTION_TXT | CAPTION_JSON):
            return ""
        data = self._read(k, record["caption_offset"], record["caption_bytes"])
        if zlib.crc32(data) != record["caption_crc32"]:
            raise self._damaged(
                k,
                "its caption differs from the one that was indexed; check the storage and run "
                "`iomm index` again",
            )
        return (caption_of_text if record["flags"] & CAPTION_TXT else caption_of_json)(data)

    def size(self, k: int) -> tuple[int, int]:
        """Return (width, height) in pixels, upright."""
        record = self.index.records[k]
        return int(record["width"]), int(record["height"])

    def shard(self, k: int) -> int:
        """Return the number of the shard that contains the sample."""
        return int(np.searchsorted(self._shard_ends, k, side="right"))

    def name(self, k: int) -> str:
        """Return shard and member, for messages."""
        offset = int(self.index.records[k]["image_offset"])
        path = self.index.shards[self.shard(k)]["path"]
        try:
            name = self._opened(self.shard(k)).name(offset)
        except OSError:
            name = ""
        return f"{path}: {name or f'sample at byte {offset}'}"

    def _damaged(self, k: int, problem: str) -> Damaged:
        return Damaged(f"{self.name(k)}: {problem}")

    def _read(self, k: int, offset: int, num_bytes: int) -> bytes:
        try:
            data = self._opened(self.shard(k)).read(int(offset), int(num_bytes))
        except OSError as error:
            raise self._damaged(k, f"cannot be read: {error.strerror}") from None
        if len(data) != num_bytes:
            raise self._damaged(
                k,
                f"{len(data)} of {num_bytes} bytes were read because the shard has changed; run "
                "`iomm index` again",
            )
        return data

    def _opened(self, number: int) -> Folder | Tar:
        with self._lock:
            if number not in self._open:
                entry = self.index.shards[number]
                self._open[number] = (
                    Folder(entry["path"], entry["files"])
                    if "files" in entry
                    else Tar(entry["path"])
                )
                while len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]
