"""List the software and hardware that IOMM uses on this machine, and what is missing.

Packages are looked up by their metadata and not imported, so a broken one does not break the
report.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from iomm.engine.cores import num_cores
from iomm.kernels import native

PRESENT, ABSENT, PROBLEM = "present", "absent", "problem"
# (part, version or "-", "present" | "absent" | "problem", note)
Row = tuple[str, str, str, str]


def rows() -> list[Row]:
    """Return a row per part. The note gives the reason and the cost of a missing one."""
    return [
        ("Python", platform.python_version(), PRESENT, sys.executable),
        ("torch", torch.__version__, PRESENT, f"{torch.get_num_threads()} CPU threads"),
        cuda_row(),
        attention_row(),
        package_row("DeepSpeed", "deepspeed", "needed for training: pip install deepspeed"),
        package_row(
            "transformers", "transformers", "needed for the MLLM: pip install transformers"
        ),
        package_row("diffusers", "diffusers", "needed for the FLUX VAE: pip install diffusers"),
        dali_row(),
        package_row(
            "Triton",
            "triton",
            "needed for torch.compile on a GPU, in the version that belongs to torch",
        ),
        package_row(
            "flash-attn", "flash_attn", "optional: without it attention uses PyTorch's kernels"
        ),
        apex_row(),
        compiler_row(
            "g++", "g++", "the C++ ops cannot be built and torch.compile does not work on CPU"
        ),
        compiler_row(
            "nvcc", "nvcc", "the CUDA ops cannot be built; on a GPU slower PyTorch ops are used"
        ),
        *native_rows(),
    ]


def git(*arguments: str) -> str:
    """Return the output of a git command in this checkout, "unknown" without git or a checkout."""
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


def cpu_name() -> str:
    """Return the processor's model name, or the architecture if /proc/cpuinfo has no name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def machine() -> dict[str, Any]:
    """Return what belongs to a measured figure: device, date, versions and commit.

    The commit ends with "and changes" if the working tree is not clean.
    """
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
        "device": gpu or f"{cpu_name()}, {num_cores()} cores",
        "gpu": gpu,
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("deepspeed", "transformers", "diffusers", "triton")},
        # None: Pillow decodes.
        "dali": " and ".join(dali_wheels().values()) or None,
        "cudnn": torch.backends.cudnn.version(),
        "attention": sdpa_backend(),
        "commit": git("rev-parse", "HEAD")
        + (" and changes" if changed not in ("", "unknown") else ""),
    }


def write_machine(run_dir: str | Path, num_ranks: int) -> None:
    """Write machine() and the number of ranks to run_dir/machine.json. Raises OSError."""
    text = json.dumps({**machine(), "ranks": num_ranks}, indent=1) + "\n"
    (Path(run_dir) / "machine.json").write_text(text, encoding="utf-8")


def version_of(distribution: str) -> str | None:
    """Return the version in a distribution's metadata, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def find(module: str) -> ModuleSpec | None:
    """Return a module's spec, or None. Imports its parent packages, not the module."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def package_row(part: str, module: str, cost: str) -> Row:
    """Return the row of a package."""
    if find(module) is None:
        return part, "-", ABSENT, cost
    return part, version_of(module.replace("_", "-")) or "unknown", PRESENT, ""


def cuda_row() -> Row:
    """Return the row of the GPU that torch sees."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        note = (
            f"{torch.cuda.device_count()} x {device.name}, {device.total_memory / 2**30:.0f} GiB, "
            f"compute capability {device.major}.{device.minor}"
        )
        return "CUDA device", torch.version.cuda, PRESENT, note
    why = (
        "torch finds no usable GPU or driver"
        if torch.version.cuda
        else "this torch is built without CUDA"
    )
    return (
        "CUDA device",
        "-",
        ABSENT,
        f"{why}; everything runs on the CPU: fine for the demo, not for IOMM-B",
    )


def sdpa_backend() -> str:
    """Return the backend that scaled_dot_product_attention picks for the joint attention."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # IOMM-B's shape without its batch: 12 heads of 128, 256 condition and 1,024 latent tokens.
    x_BALE = torch.empty(1, 12, 1280, 128, dtype=torch.bfloat16, device=device)
    return SDPBackend(torch._fused_sdp_choice(x_BALE, x_BALE, x_BALE)).name.lower()


def attention_row() -> Row:
    """Return the row of PyTorch's attention, with cuDNN's version.

    On Hopper cuDNN is the fastest choice, and PyTorch takes it only from version 9.15 on.
    """
    version, backend = torch.backends.cudnn.version(), sdpa_backend()
    note = f"scaled_dot_product_attention uses {backend} (bf16, head dim 128)"
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    slow = hopper and backend != "cudnn_attention"
    if slow:
        note += "; slower than cudnn_attention, which needs cuDNN 9.15 or later"
    found = f"cuDNN {version}" if version else "-"
    return "attention", found, PROBLEM if slow else PRESENT, note


def dali_wheels() -> dict[str, str]:
    """Return {wheel: version} of DALI's installed wheels. More than one overwrite each other."""
    return {
        name: version
        for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
        if (version := version_of(name))
    }


def dali_row() -> Row:
    """Return the row of DALI: its wheel, whether it loads, and whether it can decode on the GPU."""
    wheels = dali_wheels()
    if not wheels or find("nvidia.dali") is None:
        return (
            "DALI",
            "-",
            ABSENT,
            "Pillow decodes on the CPU instead: pip install nvidia-dali-cuda130 (or -cuda120)",
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
                "both wheels are installed and overwrite each other: pip uninstall both, "
                "then install the one for this driver"
            ),
        )
    # In another process, which a wheel that does not fit this machine may crash.
    load = subprocess.run(
        # -P: not from the user's current folder, where a file may hide a module.
        [sys.executable, "-P", "-c", "import nvidia.dali.fn"],
        capture_output=True,
        text=True,
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
                f"cpu decoding works; gpu decoding needs a driver for CUDA {wheel_major}, but "
                f"torch is built for CUDA {torch_major}"
            ),
        )
    return "DALI", version, PRESENT, "cpu and gpu decoding"


def apex_row() -> Row:
    """Return the row of NVIDIA apex.

    Only it has apex.optimizers.FusedAdam; PyPI has an unrelated package of the same name.
    """
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
    cost = "optional: without it torch's fused AdamW is used"
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
        f"{cost}; install it from github.com/NVIDIA/apex, never by `pip install apex`",
    )


def compiler_row(part: str, command: str, cost: str) -> Row:
    """Return the row of a compiler on PATH or, as nvcc, in /usr/local/cuda/bin."""
    path = shutil.which(command) or shutil.which(f"/usr/local/cuda/bin/{command}")
    if path is None:
        return part, "-", ABSENT, f"not on PATH: {cost}"
    output = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    first = output.partition("\n")[0]
    line = next((line for line in output.splitlines() if "release" in line), first)
    return part, (re.findall(r"[0-9]+(?:[.][0-9]+)+", line) or ["unknown"])[-1], PRESENT, path


def native_rows() -> list[Row]:
    """Return the rows of the libraries built from csrc/, which must load and be up to date."""
    facts = native.build_facts()
    found = []
    for device, part in (("cpu", "C++ ops"), ("cuda", "CUDA ops")):
        name = native.cpu_library_name() if device == "cpu" else "libiomm_cuda.so"
        reason = native.why_not(device)
        built = facts["built"].get(name)
        version = built["compiler"] if built else "-"
        cost = "slower PyTorch ops are used" + ("" if device == "cpu" else " on a GPU")
        if reason is None:
            found.append((part, version, PRESENT, f"{name} for {built['arch']}" if built else name))
        else:
            found.append((part, version, PROBLEM if built else ABSENT, f"{reason}; {cost}"))
    return found


def print_report() -> None:
    """Print the table of rows()."""
    table = [("part", "version", "state", "note"), *rows()]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    for row in table:
        print(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            ).rstrip()
        )
