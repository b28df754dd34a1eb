"""The number of CPU cores that this process may use. Imports nothing heavy."""

import math
import os
from pathlib import Path


def num_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    It is limited by the process's affinity and by the CPU quota of its control groups, which
    containers and batch systems set. A fraction of a core counts as one.
    """
    return max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(cpu_quota(), 2**20))))


def cpu_quota(process: Path | str = "/proc/self") -> float:
    """Return the cores that the control groups of a process grant it, infinity without a limit.

    A group may have a smaller quota than those above it, or a larger one, so the smallest counts.
    Versions 1 and 2 of control groups are read.
    """
    quotas = [math.inf]
    try:
        for top, folder in cpu_groups(Path(process)):
            while True:
                quotas.append(quota_of(folder))
                if folder == top or top not in folder.parents:
                    break
                folder = folder.parent
    except (OSError, ValueError, IndexError):
        # Not Linux, or an unknown layout.
        pass
    return min(quotas)


def cpu_groups(process: Path) -> list[tuple[Path, Path]]:
    """Return (mount point, folder) of the control groups of a process that may limit its CPU."""
    # {"" for version 2, "cpu" for version 1: path of the group}
    paths = {}
    for line in (process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            paths["cpu" if controllers else ""] = path
    found = []
    for line in (process / "mountinfo").read_text().splitlines():
        fields, _, more = line.partition(" - ")
        kind, options = more.split()[0], more.split()[-1].split(",")
        key = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if key not in paths or (kind == "cgroup" and "cpu" not in options):
            continue
        root, point = fields.split()[3:5]
        # In a container the mount may begin below the root that the path is given from.
        relative = os.path.relpath(paths[key], root)
        inside = relative if not relative.startswith("..") else "."
        found.append((Path(point), Path(os.path.normpath(f"{point}/{inside}"))))
    return found


def quota_of(folder: Path) -> float:
    """Return the quota of one control group in cores, infinity if it has none."""
    if (folder / "cpu.max").is_file():
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    if (folder / "cpu.cfs_quota_us").is_file():
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else math.inf
    return math.inf
