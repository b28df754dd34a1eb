"""Index entry -> bytes of an image, and its caption."""

import threading
import zlib
from collections import OrderedDict

import numpy as np

from iomm.config import InputError
from iomm.engine.data.archive import Folder, Tar
from iomm.engine.data.caption import caption_of_json, caption_of_text
from iomm.engine.data.image import opaque
from iomm.engine.data.index import load
from iomm.engine.data.validate import CAPTION_JSON, CAPTION_TXT, TRANSPARENT, UNVERIFIED

# shards; the order reads from 16 at a time, and 1,024 file handles are a common limit
MAX_OPEN = 256


class Damaged(InputError):
    """A sample that was good when it was indexed cannot be had now."""


class Shards:
    """The good samples of an index, by entry k in [0, len). Safe to read from several threads.

    Raises InputError if the index cannot be read or a shard has changed since, and Damaged, naming shard and sample,
    where bytes read differ from those that were indexed. Shards are read with pread: one that shrinks while it is read
    is Damaged, not a bus error. (The index is memory-mapped; `iomm index` never writes to one that exists.)
    """

    def __init__(self, index_dir):
        self.index = load(index_dir)
        self.shard_sizes = [shard["num_samples"] for shard in self.index.shards]
        self._shard_ends = np.cumsum(self.shard_sizes)
        self._open = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self):
        return len(self.index.records)

    def image_bytes(self, k):
        """The encoded image as stored, its CRC-32 checked (unless the index was made with verify="fast")."""
        record = self.index.records[k]
        data = self._read(k, record["image_offset"], record["image_bytes"])
        if not record["flags"] & UNVERIFIED and zlib.crc32(data) != record["crc32"]:
            raise self._damaged(
                k,
                "its bytes are not those that were indexed: look at the disk, run `iomm index` again",
            )
        return data

    def decodable_bytes(self, k):
        """The encoded image as the decoder takes it: laid on white if it is transparent, else as stored."""
        data = self.image_bytes(k)
        if not self.index.records[k]["flags"] & TRANSPARENT:
            return data
        try:
            return opaque(data)
        except Exception as error:
            # without a CRC the bytes may be anything, and Pillow's parsers raise anything
            raise self._damaged(k, f"cannot be decoded ({type(error).__name__}: {error})") from None

    def caption(self, k):
        """str; empty if the sample has none. Its CRC-32 is checked."""
        record = self.index.records[k]
        if not record["flags"] & (CAPTION_TXT | CAPTION_JSON):
            return ""
        data = self._read(k, record["caption_offset"], record["caption_bytes"])
        if zlib.crc32(data) != record["caption_crc32"]:
            raise self._damaged(
                k,
                "its caption is not the one that was indexed: look at the disk, run `iomm index` again",
            )
        return (caption_of_text if record["flags"] & CAPTION_TXT else caption_of_json)(data)

    def size(self, k):
        """(width, height) in pixels, upright."""
        record = self.index.records[k]
        return int(record["width"]), int(record["height"])

    def shard(self, k):
        """Number of the shard that the sample lies in."""
        return int(np.searchsorted(self._shard_ends, k, side="right"))

    def name(self, k):
        """Shard and member, for messages."""
        offset = int(self.index.records[k]["image_offset"])
        path = self.index.shards[self.shard(k)]["path"]
        try:
            return (
                f"{path}: {self._opened(self.shard(k)).name(offset) or f'sample at byte {offset}'}"
            )
        except OSError:
            return f"{path}: sample at byte {offset}"

    def _damaged(self, k, problem):
        return Damaged(f"{self.name(k)}: {problem}")

    def _read(self, k, offset, num_bytes):
        try:
            data = self._opened(self.shard(k)).read(int(offset), int(num_bytes))
        except OSError as error:
            raise self._damaged(k, f"cannot be read: {error.strerror}") from None
        if len(data) != num_bytes:
            raise self._damaged(
                k,
                f"{len(data)} of {num_bytes} bytes are there; the shard changed: run `iomm index` again",
            )
        return data

    def _opened(self, number):
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
