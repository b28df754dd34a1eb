"""What a killed compiler leaves: torch's inductor lets g++ write into its cache in place, and loads whatever lies there.

A library cut short by a SIGKILL would end every later start with "file too short"; it goes before anything is compiled.
"""

import os
import struct
from pathlib import Path

# Header of an object or library; its last table ends the file.
ELF64 = struct.Struct("<16sHHIQQQIHHHHHH")


def is_whole(path):
    """Whether an ELF file reaches to the end of its table of sections, which linkers and assemblers write last."""
    with open(path, "rb") as file:
        head = file.read(ELF64.size)
        if len(head) < ELF64.size or not head.startswith(b"\x7fELF"):
            return False
        fields = ELF64.unpack(head)
        return fields[6] + fields[11] * fields[12] <= os.fstat(file.fileno()).st_size


def being_written():
    """Files that some process of this machine has open, as far as this user may look."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(os.readlink(link))
        except OSError:
            # closed meanwhile, or somebody else's
            continue
    return found


def remove_half_compiled(folder):
    """Removes cut objects and libraries below a compile cache, those excepted that a compiler still writes. Returns their
    paths. Work for one rank a machine, before the others compile.
    """
    cut = []
    for path in [*Path(folder).glob("**/*.so"), *Path(folder).glob("**/*.o")]:
        try:
            cut += [] if is_whole(path) else [path]
        except OSError:
            # another rank's compiler has renamed or removed it
            continue
    busy = being_written() if cut else ()
    dead = [path for path in cut if str(path.resolve()) not in busy]
    for path in dead:
        path.unlink(missing_ok=True)
    return dead
