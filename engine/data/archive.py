"""Containers of samples: tars and folders of files.

They are read by position. Nothing is written or extracted.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator

# The bytes of an image decide on its format. Its suffix only marks it as an image.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# Of images that count only where a key has none with a usual suffix: other suffixes of JPEG and
# PNG, and formats that are not read, unless the suffix is wrong.
OTHER_IMAGE_SUFFIXES = (
    *("jpe", "jfif", "jif", "jfi", "pjpeg", "pjp", "apng"),
    *("avif", "bmp", "dib", "gif", "heic", "heif", "ico", "j2k", "jp2", "jxl", "psd", "tga"),
    *("tif", "tiff", "arw", "cr2", "cr3", "dng", "nef"),
)
CAPTION_SUFFIXES = ("txt", "json")
SUFFIXES = IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES + CAPTION_SUFFIXES
COMPRESSED_SUFFIXES = ("gz", "tgz", "bz2", "xz", "zst", "zip", "7z", "rar")
# Folders that viewers and systems make, in lower case.
SYSTEM_FOLDERS = {
    *("@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information"),
    *("thumbs", "thumbnails", "_thumbs", "_thumbnails"),
}
# Reasons in the sentence on what was left out. The others are added up.
MAX_REASONS = 8
BLOCK = 512
# A pax or long-name record larger than this is damage, not a name.
MAX_NAME_BYTES = 1 << 20
REGULAR = b"0\x007"
MAGIC = b"ustar"
MAGIC_OFFSET = 257
# Bytes examined in one read. A multiple of BLOCK.
SCAN_BYTES = 1 << 20
# Links, devices, folders and pipes have no data, so their size field is ignored.
NO_DATA = b"123456"
LINKS = b"12"
# A failing disk returns errors for every read. After this number in a row the tar is given up.
MAX_READ_ERRORS = 16

# Called with a reason and a message.
Report = Callable[[str, str], None]
# Name, offset of the data, number of bytes.
Member = tuple[str, int, int]


class TarError(Exception):
    """The tar is damaged from some byte on. The message names the byte."""


class LeftOut(dict[str, list]):
    """What was found and is not read: reason -> [how many, the first name]."""

    def add(self, reason: str, name: str, num: int = 1) -> None:
        """Count something that is left out."""
        if num:
            old, first = self.get(reason, (0, name if name.isprintable() else repr(name)))
            self[reason] = [old + num, first]

    def update_from(self, other: dict[str, list]) -> None:
        """Add the counts of another one."""
        for reason, (num, name) in other.items():
            self.add(reason, name, num)

    def by_count(self) -> list[tuple[str, list]]:
        """Return the items, the most frequent reason first."""
        return sorted(self.items(), key=lambda item: (-item[1][0], item[0]))

    def describe(self) -> str:
        """Return the counts by reason in a line."""
        items = self.by_count()
        parts = [f"{num:,} {reason}" for reason, (num, _) in items[:MAX_REASONS]]
        others = sum(num for _, (num, _) in items[MAX_REASONS:])
        return ", ".join(parts + ([f"{others:,} others"] if others else []))


def hidden_reason(name: str, is_folder: bool) -> str | None:
    """Return why a file or folder of this name is not data, or None."""
    if is_folder:
        hidden = name.startswith(".") or name.lower() in SYSTEM_FOLDERS
        return "in a hidden or thumbnail folder" if hidden else None
    return "hidden files" if name.startswith(".") else None


def reason_to_leave_out(name: str) -> str | None:
    """Return why a member of a tar or folder is neither image nor caption, or None if it is one.

    name: path inside the tar or folder.
    """
    *folders, base = (part for part in name.split("/") if part not in ("", ".", ".."))
    for folder in folders:
        if reason := hidden_reason(folder, is_folder=True):
            return reason
    if reason := hidden_reason(base, is_folder=False):
        return reason
    _, dot, suffix = base.rpartition(".")
    suffix = suffix.lower()
    if dot and suffix in SUFFIXES:
        return None
    # Names may have dots, so what follows the last one need not be a suffix.
    if dot and suffix.isalnum() and len(suffix) <= 8:
        return f"named *.{suffix}"
    return "without a suffix"


class Tar:
    """An open tar.

    It is read with pread and never mapped into memory: a mapped file that shrinks kills its reader
    with SIGBUS.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Open the file.

        Raises:
            OSError: the file cannot be opened, or is not a regular file (a pipe would block).
        """
        self.path = str(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")

    def members(
        self, report: Report | None = None, left_out: LeftOut | None = None
    ) -> Iterator[Member]:
        """Yield (name, offset, num_bytes) of each regular member. See walk for the arguments."""
        # A generator keeps a reference to self, and with it the file open.
        yield from walk(self._fd, os.fstat(self._fd).st_size, report, left_out)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return num_bytes bytes, or fewer if the file ends before. Raises OSError."""
        return os.pread(self._fd, num_bytes, offset)

    def name(self, offset: int) -> str:
        """Return the name of the member whose data starts at offset, for messages.

        The format cuts a name of over 100 bytes.
        """
        return _ustar_name(self.read(offset - BLOCK, BLOCK)).decode("utf-8", "replace")

    def __del__(self) -> None:
        # The last thread that holds a reference closes the file. A cache can therefore drop it
        # while another thread still reads.
        if hasattr(self, "_fd"):
            os.close(self._fd)


class Folder:
    """A folder of files, read as if it were a tar.

    The offset of a member is its place in the sorted list `files`. Linked subfolders are read too,
    but no folder twice. What is not read is counted in `left_out`.
    """

    def __init__(self, path: str | os.PathLike, files: list[str] | None = None) -> None:
        """List the folder and its subfolders, unless `files` is given. Raises OSError."""
        self.path = str(path)
        self.left_out = LeftOut()
        self.files = _list_files(self.path, self.left_out) if files is None else files

    def members(
        self, report: Report | None = None, left_out: LeftOut | None = None
    ) -> Iterator[Member]:
        """Yield (name, offset, num_bytes) of each file.

        A file whose size cannot be read has 0 bytes here, and reading it raises OSError.
        """
        if left_out is not None:
            left_out.update_from(self.left_out)
        for offset, name in enumerate(self.files):
            try:
                num_bytes = os.stat(os.path.join(self.path, name)).st_size
            except OSError:
                num_bytes = 0
            yield name, offset, num_bytes

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return the bytes of a file. Raises OSError.

        A file shorter than num_bytes yields fewer bytes. A longer file yields one more, by which
        callers detect it.
        """
        with open(os.path.join(self.path, self.files[offset]), "rb", opener=_open_regular) as f:
            return f.read(num_bytes + 1)

    def name(self, offset: int) -> str:
        return self.files[offset]


def _open_regular(path: str, flags: int) -> int:
    """Open a file for reading. Raise OSError for a pipe, which would block, or a device."""
    fd = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def _list_files(path: str, left_out: LeftOut) -> list[str]:
    """Return the files of a folder, relative and sorted, and count what is left out.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    files = []
    # Identities of the folders that were read. Folders in the tree come before linked ones, so a
    # file has the same name whatever links to it.
    seen = set()
    waiting = [path]

    def failed(error: OSError) -> None:
        if error.filename == path:
            raise error
        left_out.add("unreadable folders", _relative(error.filename, path))

    while waiting:
        start = waiting.pop(0)
        links = []
        for root, folders, names in os.walk(start, onerror=failed):
            try:
                status = os.stat(root)
            except OSError as error:
                failed(error)
                folders.clear()
                continue
            if (status.st_dev, status.st_ino) in seen:
                left_out.add("linked folders that were read already", _relative(root, path))
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            for name in sorted(names):
                relative = _relative(os.path.join(root, name), path)
                reason = reason_to_leave_out(relative)
                if reason is None:
                    files.append(relative)
                else:
                    left_out.add(reason, relative)
            for folder in folders[:]:
                place = os.path.join(root, folder)
                if hidden_reason(folder, is_folder=True):
                    _count_hidden(place, path, left_out)
                    folders.remove(folder)
                elif os.path.islink(place):
                    links.append(place)
            folders.sort()
        waiting += sorted(links)
    return sorted(files)


def _relative(name: str, folder: str) -> str:
    # os.path.relpath takes 10 times as long.
    return name[len(os.path.join(folder, "")) :]


def _count_hidden(folder: str, path: str, left_out: LeftOut) -> None:
    """Count the images of a folder that is not data."""
    images = IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in images:
                relative = _relative(os.path.join(root, name), path)
                left_out.add("in a hidden or thumbnail folder", relative)


def walk(
    fd: int, num_bytes: int, report: Report | None = None, left_out: LeftOut | None = None
) -> Iterator[Member]:
    """Yield (name, offset, size) of the regular members of an open tar.

    Names in ustar, pax and GNU format may have any length. Links, devices and folders are skipped.
    Blocks of zeros are skipped as well, so members after a premature end (two concatenated tars)
    are found.

    A damaged header or member raises TarError. With `report`, it is reported as "bad_tar" and
    reading resumes at the next good header. A tar that does not end in a block of zeros, which the
    format requires, is reported as "no_end": it may have been truncated between two members.
    Python's tarfile stops silently at a bad header and at every truncation. A part of the tar that
    the disk cannot read is damage, too.

    Args:
        fd: file descriptor of the tar.
        num_bytes: length of the file.
        report: called with (reason, message) for each damage, or None to raise.
        left_out: counts links, or None.

    Raises:
        TarError: the tar is damaged and `report` is None.
        OSError: the tar cannot be read at all.
    """
    position = 0
    long_name = None
    pax = {}
    ended = False
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
                    # V7 tars mark folders by a trailing slash.
                    if not name.endswith(b"/"):
                        yield name.decode("utf-8", "surrogateescape"), start, size
                elif kind in LINKS and left_out is not None:
                    name = (long_name or _ustar_name(header)).decode("utf-8", "replace")
                    if reason_to_leave_out(name) is None:
                        left_out.add("links in a tar", name)
                long_name = None
                pax = {}
            position = start + -(-size // BLOCK) * BLOCK
        except (TarError, OSError) as error:
            if report is None or (isinstance(error, OSError) and not position):
                raise
            if isinstance(error, OSError):
                error = f"byte {position} of {num_bytes} cannot be read: {error.strerror}"
            position = _next_header(fd, position + BLOCK, num_bytes)
            resumed = f"; reading resumes at byte {position}" if position < num_bytes else ""
            report("bad_tar", f"{error}{resumed}")
            long_name = None
            pax = {}
            # A tar that ends in damage is not reported as "no_end" too.
            ended = position >= num_bytes
    if num_bytes and not ended and report is not None:
        message = "the tar has no end marker and may have been truncated between two members"
        report("no_end", message)


def _read_header(
    header: bytes, position: int, num_bytes: int, pax: dict[str, str]
) -> tuple[bytes, int, int]:
    """Return (kind, size, start of the data) of the member whose header is at `position`.

    Args:
        header: the block at `position`.
        position: offset of the header in the tar.
        num_bytes: length of the tar.
        pax: pax records that precede the member. A size among them overrides the header's.

    Raises:
        TarError: the header is damaged or claims more data than the tar has.
    """
    if len(header) < BLOCK or not _checksum_fits(header):
        raise TarError(
            f"no valid header at byte {position} of {num_bytes}" + _hint(header, position)
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
            f"the member at byte {position} claims {size} bytes, but {num_bytes - start} are left"
        )
    if kind in b"xgLK" and size > MAX_NAME_BYTES:
        raise TarError(
            f"the name record at byte {position} claims {size} bytes, over the limit of "
            f"{MAX_NAME_BYTES}"
        )
    return kind, size, start


def _next_header(fd: int, position: int, num_bytes: int) -> int:
    """Return the position of the next good header, or num_bytes if there is none.

    `position` is where the search starts, a multiple of BLOCK. Only headers with the magic of POSIX
    and GNU are found. All tars of this century have it.
    """
    num_errors = 0
    while position < num_bytes:
        try:
            chunk = os.pread(fd, SCAN_BYTES, position)
        except OSError:
            num_errors += 1
            if num_errors > MAX_READ_ERRORS:
                raise
            position += SCAN_BYTES
            continue
        num_errors = 0
        at = chunk.find(MAGIC)
        while at >= 0:
            start = at - MAGIC_OFFSET
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


def _checksum_fits(header: bytes) -> bool:
    """Return whether the checksum of a header is valid.

    It is the sum of the header's bytes, with its own field counted as blanks. Old tars summed the
    bytes as signed.
    """
    try:
        stored = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    rest = header[:148] + header[156:]
    unsigned = sum(rest) + 8 * 0x20
    return stored in (unsigned, unsigned - 256 * sum(byte > 127 for byte in rest))


def _number(field: bytes, position: int) -> int:
    # Sizes over 8 GiB are in base 256. A negative one starts with 0xff.
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


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_records(data: bytes, position: int) -> dict[str, str]:
    r"""Return {key: value} of `LENGTH key=value\n` records."""
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


def _past_zeros(fd: int, position: int, num_bytes: int) -> int:
    """Return the position where a run of zero blocks ends, reading 1 MiB at a time."""
    while position < num_bytes:
        chunk = os.pread(fd, SCAN_BYTES, position)
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk) or not chunk:
            return position + zeros // BLOCK * BLOCK
        position += len(chunk)
    return position


def _hint(header: bytes, position: int) -> str:
    """Return the likely type of a file whose first header is invalid, for a message."""
    if position:
        return ""
    if header[:2] == b"\x1f\x8b":
        return " (it is compressed with gzip; decompress it first)"
    if header[:4] == b"\x28\xb5\x2f\xfd":
        return " (it is compressed with zstd; decompress it first)"
    for start, kind in (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"PK\x03\x04", "zip"):
        if header.startswith(start):
            return f" (it is compressed with {kind}; make it a tar first)"
    if header.startswith((b"\xff\xd8\xff", b"\x89PNG", b"RIFF")):
        return " (it is an image; give its folder)"
    return " (it is not a tar)"
