"""Index entry -> bytes of an image, and its caption."""

import threading
import zlib
from collections import OrderedDict

from iomm.config import InputError
from iomm.engine.data.archive import Folder, Tar
from iomm.engine.data.caption import caption_of_json, caption_of_text
from iomm.engine.data.image import opaque
from iomm.engine.data.index import CAPTION_JSON, CAPTION_TXT, TRANSPARENT, load

MAX_OPEN = 256      # shards; the order reads from 16 at a time, and 1,024 file handles are a common limit


class Shards:
    """The good samples of an index, by entry k in [0, len). Safe to read from several threads.

    Raises InputError if the index cannot be read, if a shard has changed since, and, naming shard and sample, where
    bytes read differ from those that were indexed.
    """

    def __init__(self, index_dir):
        self.index = load(index_dir)
        self.shard_sizes = [shard["num_samples"] for shard in self.index.shards]
        self._open = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self):
        return len(self.index.records)

    def image_bytes(self, k):
        """The encoded image as stored, its CRC-32 checked."""
        record = self.index.records[k]
        data = self._read(k, record["image_offset"], record["image_bytes"])
        if zlib.crc32(data) != record["crc32"]:
            raise InputError(
                f"{self.name(k)}: its bytes are not those that were indexed: look at the disk, run `iomm index` again")
        return data

    def decodable_bytes(self, k):
        """The encoded image as the decoder takes it: laid on white if it is transparent, else as stored."""
        data = self.image_bytes(k)
        return opaque(data) if self.index.records[k]["flags"] & TRANSPARENT else data

    def caption(self, k):
        """str; empty if the sample has none."""
        record = self.index.records[k]
        if not record["flags"] & (CAPTION_TXT | CAPTION_JSON):
            return ""
        parse = caption_of_text if record["flags"] & CAPTION_TXT else caption_of_json
        return parse(self._read(k, record["caption_offset"], record["caption_bytes"]))

    def size(self, k):
        """(width, height) in pixels, upright."""
        record = self.index.records[k]
        return int(record["width"]), int(record["height"])

    def name(self, k):
        """Shard and member, for messages."""
        record = self.index.records[k]
        path = self.index.shards[record["shard"]]["path"]
        try:
            return f"{path}: {self._shard(record['shard']).name(int(record['image_offset']))}"
        except OSError:
            return f"{path}: sample at byte {record['image_offset']}"

    def _read(self, k, offset, num_bytes):
        try:
            data = self._shard(self.index.records[k]["shard"]).read(int(offset), int(num_bytes))
        except OSError as error:
            raise InputError(f"{self.name(k)} cannot be read: {error.strerror}") from None
        if len(data) != num_bytes:
            raise InputError(f"{self.name(k)}: {len(data)} of {num_bytes} bytes are there; the shard changed: "
                             "run `iomm index` again")
        return data

    def _shard(self, number):
        number = int(number)
        with self._lock:
            if number not in self._open:
                entry = self.index.shards[number]
                self._open[number] = Folder(entry["path"], entry["files"]) if "files" in entry else Tar(entry["path"])
                while len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]
