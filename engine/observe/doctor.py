"""What this machine has of the parts that IOMM uses, why a part is missing, and what that costs.

Nothing heavy is imported: a package is looked up by its metadata, so that the report also comes where a part is broken.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from iomm.kernels import native

PRESENT, ABSENT, PROBLEM = "present", "absent", "problem"


def rows():
    """[(part, version or "-", "present" | "absent" | "problem", note)]; the note says why, and what it costs."""
    return [
        ("Python", platform.python_version(), PRESENT, sys.executable),
        ("torch", torch.__version__, PRESENT, f"{torch.get_num_threads()} CPU threads"),
        cuda_row(),
        package_row("DeepSpeed", "deepspeed", "training needs it: pip install deepspeed"),
        package_row("transformers", "transformers", "the MLLM needs it: pip install transformers"),
        package_row("diffusers", "diffusers", "the FLUX VAE needs it: pip install diffusers"),
        dali_row(),
        package_row(
            "Triton",
            "triton",
            "torch.compile on a GPU needs it, in the version that belongs to torch",
        ),
        package_row(
            "flash-attn", "flash_attn", "costs nothing: attention runs through PyTorch's kernels"
        ),
        apex_row(),
        compiler_row(
            "g++", "g++", "the C++ ops cannot be built and torch.compile does not work on CPU"
        ),
        compiler_row(
            "nvcc", "nvcc", "the CUDA ops cannot be built; slower PyTorch does their work on a GPU"
        ),
        *native_rows(),
    ]


def git(*arguments):
    """Return what git prints of this checkout, "unknown" where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def cpu_name():
    """Return the processor's model name, or the machine's architecture where /proc does not give it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def machine():
    """What a measured figure needs beside it: device, date, versions, commit ("and changes" if the tree is not clean)."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    changed = git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        ":/",
        ":(top,exclude)benchmarks/results",
        ":(top,exclude)*.md",
    )
    return {
        "device": gpu or f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "gpu": gpu,
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("deepspeed", "transformers", "diffusers", "triton")},
        # None: Pillow decodes
        "dali": " and ".join(dali_wheels().values()) or None,
        "commit": git("rev-parse", "HEAD")
        + (" and changes" if changed not in ("", "unknown") else ""),
    }


def write_machine(run_dir, num_ranks: int) -> None:
    """Write run_dir/machine.json: machine() at the last start of the run, and its number of ranks.

    Raises OSError.
    """
    text = json.dumps({**machine(), "ranks": num_ranks}, indent=1) + "\n"
    (Path(run_dir) / "machine.json").write_text(text, encoding="utf-8")


def version_of(distribution):
    """Version from a distribution's metadata, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def find(module):
    """The module's spec without importing it (parents are), or None."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def package_row(part, module, cost):
    """Row of a package that is looked up and not imported."""
    if find(module) is None:
        return part, "-", ABSENT, cost
    return part, version_of(module.replace("_", "-")) or "unknown", PRESENT, ""


def cuda_row():
    """Row of the GPU that torch sees."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        note = (
            f"{torch.cuda.device_count()} x {device.name}, {device.total_memory / 2**30:.0f} GiB, "
            f"compute capability {device.major}.{device.minor}"
        )
        return "CUDA device", torch.version.cuda, PRESENT, note
    why = (
        "torch sees no usable GPU or driver"
        if torch.version.cuda
        else "this torch is built without CUDA"
    )
    return (
        "CUDA device",
        "-",
        ABSENT,
        f"{why}; everything runs on the CPU: fine for the demo, not for IOMM-B",
    )


def dali_wheels():
    """{wheel: version} of DALI's wheels that are installed; more than one overwrite each other."""
    return {
        name: version
        for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
        if (version := version_of(name))
    }


def dali_row():
    """Row of DALI: which wheel, whether it loads, and whether it can decode on the GPU."""
    wheels = dali_wheels()
    if not wheels or find("nvidia.dali") is None:
        return (
            "DALI",
            "-",
            ABSENT,
            "Pillow decodes instead, on the CPU: pip install nvidia-dali-cuda130 (or -cuda120)",
        )
    version = " and ".join(
        f"{version} ({name.rpartition('-')[2]})" for name, version in wheels.items()
    )
    if len(wheels) > 1:
        return (
            "DALI",
            version,
            PROBLEM,
            (
                "both wheels are installed and overwrite one another: pip uninstall both, "
                "then install the one for this driver"
            ),
        )
    # Another process: a wheel that does not fit this machine may end the one that loads it.
    load = subprocess.run(
        [sys.executable, "-c", "import nvidia.dali.fn"], capture_output=True, text=True
    )
    if load.returncode:
        return (
            "DALI",
            version,
            PROBLEM,
            f"does not load: {(load.stderr.strip().splitlines() or ['no message'])[-1]}",
        )
    if not torch.cuda.is_available():
        return "DALI", version, PRESENT, "cpu decoding works; gpu decoding needs a GPU"
    wheel_major = re.search(r"cuda(\d+)0$", next(iter(wheels)))[1]
    torch_major = (torch.version.cuda or "").partition(".")[0]
    if wheel_major != torch_major:
        return (
            "DALI",
            version,
            PRESENT,
            (
                f"cpu decoding works; gpu decoding needs a driver for CUDA {wheel_major}, "
                f"torch is for CUDA {torch_major}"
            ),
        )
    return "DALI", version, PRESENT, "cpu and gpu decoding"


def apex_row():
    """Row of NVIDIA apex, told from the unrelated package of that name on PyPI by apex.optimizers.FusedAdam."""
    spec = find("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    fused = next(
        (
            path
            for folder in folders
            if (path := Path(folder, "optimizers", "fused_adam.py")).is_file()
        ),
        None,
    )
    cost = "costs nothing: torch's fused AdamW does the work"
    if fused is not None and "class FusedAdam" in fused.read_text(errors="replace"):
        return (
            "NVIDIA apex",
            version_of("apex") or "unknown",
            PRESENT,
            "apex.optimizers.FusedAdam found",
        )
    if spec is not None:
        return (
            "NVIDIA apex",
            "-",
            ABSENT,
            f"the `apex` here is PyPI's unrelated package: pip uninstall apex; {cost}",
        )
    return (
        "NVIDIA apex",
        "-",
        ABSENT,
        f"{cost}; if wanted, from github.com/NVIDIA/apex, never `pip install apex`",
    )


def compiler_row(part, command, cost):
    """Row of a compiler on PATH (nvcc also in /usr/local/cuda/bin)."""
    path = shutil.which(command) or shutil.which(f"/usr/local/cuda/bin/{command}")
    if path is None:
        return part, "-", ABSENT, f"not on PATH: {cost}"
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    line = next((line for line in said.splitlines() if "release" in line), said.partition("\n")[0])
    return part, (re.findall(r"[0-9]+(?:[.][0-9]+)+", line) or ["unknown"])[-1], PRESENT, path


def native_rows():
    """Rows of the two libraries made from csrc/: what was built, and whether it loads and is up to date."""
    facts = native.build_facts()
    found = []
    for device, part in (("cpu", "C++ ops"), ("cuda", "CUDA ops")):
        name = native.cpu_library_name() if device == "cpu" else "libiomm_cuda.so"
        reason = native.why_not(device)
        built = facts["built"].get(name)
        version = built["compiler"] if built else "-"
        cost = "slower PyTorch does their work" + ("" if device == "cpu" else " on a GPU")
        if reason is None:
            found.append((part, version, PRESENT, f"{name} for {built['arch']}" if built else name))
        else:
            found.append((part, version, PROBLEM if built else ABSENT, f"{reason}; {cost}"))
    return found


def print_report():
    """Prints the table of `rows()`."""
    table = [("part", "version", "state", "note"), *rows()]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    for row in table:
        print(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip()
        )
