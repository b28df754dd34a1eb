"""What samples lie in: a tar, or a folder of files. Only ever read, by position; nothing is extracted."""

import errno
import os
import re
import stat
from pathlib import Path

SUFFIXES = ("jpg", "jpeg", "png", "webp", "txt", "json")
BLOCK = 512
# A pax or long-name member larger than this is damage, not a name.
MAX_NAME_BYTES = 1 << 20
REGULAR = b"0\x007"
MAGIC, MAGIC_AT = b"ustar", 257
# Bytes looked at in one read; a multiple of BLOCK.
SCAN = 1 << 20
# links, devices, folders, pipes: their size field says nothing
NO_DATA = b"123456"


class TarError(Exception):
    """The tar is damaged from some byte on. The message says where."""


class Tar:
    """An open tar. Read with pread, never mapped: a mapped file that shrinks kills its reader with SIGBUS."""

    def __init__(self, path):
        """Raises OSError if the file cannot be opened, or is none (a pipe would be waited for)."""
        self.path = str(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")

    def members(self, report=None):
        """Yields (name, offset, num_bytes) of each regular member; report: see walk."""
        # A generator, so that it holds the file open.
        yield from walk(self._fd, os.fstat(self._fd).st_size, report)

    def read(self, offset, num_bytes):
        """bytes; fewer than num_bytes if the file ends before. Raises OSError."""
        return os.pread(self._fd, num_bytes, offset)

    def name(self, offset):
        """Name of the member whose data starts at offset, for messages (a name over 100 bytes is cut by the format)."""
        return _ustar_name(self.read(offset - BLOCK, BLOCK)).decode("utf-8", "replace")

    def __del__(self):
        # closed by the last thread that holds it, so that dropping it from a cache cannot pull it from under a reader
        if hasattr(self, "_fd"):
            os.close(self._fd)


class Folder:
    """A folder of files, read as if it were a tar: the offset of a member is its place in the sorted list `files`."""

    def __init__(self, path, files=None):
        """Lists the folder and what lies below it, unless the list is given. Raises OSError if it cannot be read."""
        self.path = str(path)
        self.files = (
            files
            if files is not None
            else sorted(
                str((Path(root) / name).relative_to(path))
                for root, _, names in os.walk(path)
                for name in names
                if name.rpartition(".")[2].lower() in SUFFIXES
            )
        )

    def members(self, report=None):
        """Yields (name, offset, num_bytes) of each file."""
        for offset, name in enumerate(self.files):
            yield name, offset, os.stat(os.path.join(self.path, name)).st_size

    def read(self, offset, num_bytes):
        """bytes; fewer than num_bytes if the file is shorter, one more if it is longer. Raises OSError."""
        with open(os.path.join(self.path, self.files[offset]), "rb") as f:
            return f.read(num_bytes + 1)

    def name(self, offset):
        return self.files[offset]


def walk(fd, num_bytes, report=None):
    """Yields (name, offset, size) of the regular members of the open tar fd, num_bytes long; offset is where the data
    starts.

    ustar, pax and GNU names of any length; links, devices and folders are passed over. Blocks of zeros are stepped
    over, so members behind a premature end (two tars joined) are found. At a damaged header or member it raises
    TarError, or with `report` calls report("bad_tar", message) and goes on at the next good header. A tar that does not
    end in a block of zeros, as the format wants, is reported as "no_end": its writer may have been cut off between two
    members. (Python's tarfile ends at a bad header, and at every cut, without a word.)
    """
    position, long_name, pax, ended = 0, None, {}, False
    while position < num_bytes:
        try:
            header = os.pread(fd, BLOCK, position)
            ended = bool(header) and not any(header)
            if ended:
                position = _past_zeros(fd, position, num_bytes)
                continue
            kind, size, start = _read_header(header, position, num_bytes, pax)
            if kind in b"xgLK":
                data = os.pread(fd, size, start)
                if kind == b"x":
                    pax = _pax_records(data, position)
                elif kind == b"L":
                    long_name = data.rstrip(b"\0")
            else:
                if kind in REGULAR:
                    name = long_name or _ustar_name(header)
                    if "path" in pax:
                        name = pax["path"].encode("utf-8", "surrogateescape")
                    # how V7 tars write folders
                    if not name.endswith(b"/"):
                        yield name.decode("utf-8", "surrogateescape"), start, size
                long_name, pax = None, {}
            position = start + -(-size // BLOCK) * BLOCK
        except TarError as error:
            if report is None:
                raise
            position = _next_header(fd, position + BLOCK, num_bytes)
            left = f"; members go on at byte {position}" if position < num_bytes else ""
            report("bad_tar", f"{error}{left}")
            # One report is enough for one end.
            long_name, pax, ended = None, {}, position >= num_bytes
    if num_bytes and not ended and report is not None:
        report("no_end", "the tar has no end mark: it may have been cut between two members")


def _read_header(header, position, num_bytes, pax):
    """(kind, size, start of the data) of the member whose header stands at position. Raises TarError."""
    if len(header) < BLOCK or not _checksum_fits(header):
        raise TarError(
            f"no valid header at byte {position} of {num_bytes}" + _what_instead(header, position)
        )
    kind = header[156:157]
    size = (
        int(pax["size"])
        if re.fullmatch("[0-9]{1,20}", pax.get("size", ""))
        else _number(header[124:136], position)
    )
    start = position + BLOCK
    if kind in NO_DATA:
        size = 0
    if size < 0 or start + size > num_bytes:
        raise TarError(
            f"the member at byte {position} claims {size} bytes, {num_bytes - start} are left"
        )
    if kind in b"xgLK" and size > MAX_NAME_BYTES:
        raise TarError(f"the name record at byte {position} claims {size} bytes")
    return kind, size, start


def _next_header(fd, position, num_bytes):
    """Where the next good header stands at or after position (a multiple of BLOCK), or num_bytes if there is none.

    Only headers with the magic of POSIX and GNU are found: all tars of this century have it.
    """
    while position < num_bytes:
        chunk = os.pread(fd, SCAN, position)
        at = chunk.find(MAGIC)
        while at >= 0:
            start = at - MAGIC_AT
            if (
                start >= 0
                and start % BLOCK == 0
                and start + BLOCK <= len(chunk)
                and _checksum_fits(chunk[start : start + BLOCK])
            ):
                return position + start
            at = chunk.find(MAGIC, at + 1)
        if len(chunk) < BLOCK:
            break
        position += len(chunk) // BLOCK * BLOCK
    return num_bytes


def _checksum_fits(header):
    """The header's sum with its own field read as blanks; old tars added the bytes up as signed."""
    try:
        wanted = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    rest = header[:148] + header[156:]
    unsigned = sum(rest) + 8 * 0x20
    return wanted in (unsigned, unsigned - 256 * sum(byte > 127 for byte in rest))


def _number(field, position):
    # base 256, for sizes over 8 GiB; 0xff leads a negative one
    if field[0] & 0x80:
        return (
            int.from_bytes(field, "big", signed=True)
            if field[0] == 0xFF
            else int.from_bytes(field[1:], "big")
        )
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise TarError(f"the header at byte {position} has no readable size") from None


def _ustar_name(header):
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_records(data, position):
    """{key: value} of `LENGTH key=value\\n` records."""
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not re.fullmatch(b"[0-9]{1,9}", length) or not len(length) + 2 < int(length) <= len(
            data
        ):
            raise TarError(f"the pax record at byte {position} is damaged")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return records


def _past_zeros(fd, position, num_bytes):
    """Where the run of zero blocks ends; read 1 MiB at a time."""
    while position < num_bytes:
        chunk = os.pread(fd, SCAN, position)
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk) or not chunk:
            return position + zeros // BLOCK * BLOCK
        position += len(chunk)
    return position


def _what_instead(header, position):
    if position:
        return ""
    if header[:2] == b"\x1f\x8b":
        return " (it is compressed with gzip: unpack it first)"
    if header[:4] == b"\x28\xb5\x2f\xfd":
        return " (it is compressed with zstd: unpack it first)"
    return " (it is not a tar)"
