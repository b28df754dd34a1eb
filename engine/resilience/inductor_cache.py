"""Remove what a killed compiler left in torch inductor's cache.

Inductor lets g++ write into its cache in place, and loads any library that it finds there. A
library truncated by a SIGKILL would end every later start with "file too short". It is removed
before anything is compiled.
"""

import os
import struct
from pathlib import Path

# Header of an ELF object or library. The section header table is last in the file.
ELF64 = struct.Struct("<16sHHIQQQIHHHHHH")


def is_whole(path: Path | str) -> bool:
    """Return whether an ELF file reaches to the end of its section header table.

    Linkers and assemblers write this table last.
    """
    with open(path, "rb") as file:
        head = file.read(ELF64.size)
        if len(head) < ELF64.size or not head.startswith(b"\x7fELF"):
            return False
        fields = ELF64.unpack(head)
        return fields[6] + fields[11] * fields[12] <= os.fstat(file.fileno()).st_size


def being_written() -> set[str]:
    """Return the paths of all files that are open on this machine.

    Processes that this user may not inspect are left out.
    """
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(os.readlink(link))
        except OSError:
            # It was closed in the meantime, or belongs to another user.
            continue
    return found


def remove_half_compiled(folder: Path | str) -> list[Path]:
    """Remove truncated objects and libraries below a compile cache, and return their paths.

    Files that a compiler still writes are kept. Call it on one rank per machine, before the others
    compile.
    """
    truncated = []
    for path in [*Path(folder).glob("**/*.so"), *Path(folder).glob("**/*.o")]:
        try:
            if not is_whole(path):
                truncated.append(path)
        except OSError:
            # Another rank's compiler has renamed or removed it.
            continue
    busy = being_written() if truncated else ()
    removed = [path for path in truncated if str(path.resolve()) not in busy]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed
