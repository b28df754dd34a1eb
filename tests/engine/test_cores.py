"""The number of cores follows affinity and the quotas of control groups, versions 1 and 2."""

import math
import os

import pytest

from iomm.engine import cores
from iomm.engine.cores import cpu_quota, num_cores
from iomm.engine.data import index
from iomm.engine.observe import doctor
from iomm.engine.parallel import cpu_ranks


def process(folder, groups, mounts):
    """Write the files of a process: lines of cgroup, and (root, mount point, type, options)."""
    (folder / "proc").mkdir()
    (folder / "proc/cgroup").write_text("".join(f"{line}\n" for line in groups))
    lines = [
        f"{31 + n} 23 0:{28 + n} {root} {folder}{point} rw - {kind} {kind} rw,{options}\n"
        for n, (root, point, kind, options) in enumerate(mounts)
    ]
    (folder / "proc/mountinfo").write_text("".join(lines))
    return folder / "proc"


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("cpu_", "cpu.", 1)).write_text(text)


@pytest.mark.parametrize(
    "own, above, expected",
    [
        ("150000 100000\n", "max 100000\n", 1.5),
        ("max 100000\n", "400000 100000\n", 4.0),
        ("800000 100000\n", "50000 100000\n", 0.5),
        ("max 100000\n", "max 100000\n", math.inf),
    ],
)
def test_version_2(own, above, expected, tmp_path):
    write(tmp_path / "cg/job", cpu_max=above)
    write(tmp_path / "cg/job/step", cpu_max=own)
    mounts = [("/", "/cg", "cgroup2", "nsdelegate")]
    assert cpu_quota(process(tmp_path, ["0::/job/step"], mounts)) == expected


@pytest.mark.parametrize("root, path", [("/", "/docker/1"), ("/docker/1", "/docker/1")])
def test_version_1(root, path, tmp_path):
    """In a container the mount begins at the container's own group."""
    folder = tmp_path / "cpu" / os.path.relpath(path, root)
    write(folder, cpu_cfs_quota_us="250000\n", cpu_cfs_period_us="100000\n")
    groups = ["3:memory:/x", f"2:cpu,cpuacct:{path}", "0::/"]
    mounts = [("/", "/mem", "cgroup", "memory"), (root, "/cpu", "cgroup", "cpu,cpuacct")]
    assert cpu_quota(process(tmp_path, groups, mounts)) == 2.5
    write(folder, cpu_cfs_quota_us="-1\n")
    assert cpu_quota(tmp_path / "proc") == math.inf


def test_a_container_whose_path_is_that_of_the_host(tmp_path):
    write(tmp_path / "cg", cpu_max="300000 100000\n")
    mounts = [("/other", "/cg", "cgroup2", "x")]
    assert cpu_quota(process(tmp_path, ["0::/docker/1"], mounts)) == 3.0


def test_unknown_layouts_have_no_quota(tmp_path):
    assert cpu_quota(tmp_path / "nothing") == math.inf
    assert cpu_quota(process(tmp_path, ["nonsense"], [])) == math.inf


@pytest.mark.parametrize("quota, expected", [(0.25, 1), (1.5, 2), (3.0, 3), (64, 4), (math.inf, 4)])
def test_cores_are_limited_by_affinity_and_quota(quota, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert num_cores() == expected
    assert "4 cores" not in doctor.machine()["device"] or expected == 4
    for module in (cpu_ranks, index, doctor):
        assert module.num_cores is num_cores


def test_no_other_count_of_cores_is_used():
    from test_house import sources

    names = ("cpu_count(", "sched_getaffinity(", "process_cpu_count(")
    found = {
        path.parts[-2] + "/" + path.name
        for path in sources()
        if "tests" not in path.parts and any(name in path.read_text() for name in names)
    }
    # The loader's benchmark pins itself to a number of cores.
    assert found == {"engine/cores.py", "benchmarks/loader.py"}
