"""Load the libraries that setup.py compiles from csrc/, and call their entry points.

Calling convention: every entry point takes int64, double and raw pointer arguments, then how to
run (the number of threads on a CPU, the stream on CUDA), and returns 0 or an error code. A
library that is older than the sources in csrc/ is not loaded.
"""

import ctypes
import functools
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "lib"
CSRC = FOLDER.parent.parent / "csrc"
REBUILD = "run `pip install -e .` again"


def source_hash() -> str | None:
    """Return the first 16 hex digits of the SHA-256 of csrc/, computed as in setup.py.

    Returns None if there are no sources (an installed wheel).
    """
    if not (CSRC / "philox.h").exists():
        return None
    digest = hashlib.sha256()
    for path in sorted(CSRC.iterdir()):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build_facts(folder: Path = FOLDER) -> dict[str, Any]:
    """Return the content of build.json.

    It holds the source hash, the libraries that were built with their compilers, and the missing
    libraries with the reasons.
    """
    try:
        return json.loads((folder / "build.json").read_text())
    except (OSError, ValueError):
        return {"source_hash": None, "built": {}, "missing": {}}


def cpu_library_name() -> str:
    """Return the file name of the build for this CPU.

    The v3 build needs AVX2, FMA, BMI and MOVBE, which Intel CPUs have had since 2013 and AMD CPUs
    since 2015.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            flags = set(
                Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
            )
        except OSError:
            flags = set()
        if {"avx2", "fma", "bmi1", "bmi2", "movbe", "f16c", "abm"} <= flags and (
            FOLDER / "libiomm_cpu_v3.so"
        ).exists():
            return "libiomm_cpu_v3.so"
    return "libiomm_cpu.so"


@functools.cache
def load(device: str) -> tuple[ctypes.CDLL | None, str | None]:
    """Return (library, None), or (None, reason), for device type "cpu" or "cuda"."""
    name = cpu_library_name() if device == "cpu" else "libiomm_cuda.so"
    if not (FOLDER / name).exists():
        return None, build_facts()["missing"].get(name, f"{name} was not built ({REBUILD})")
    try:
        library = ctypes.CDLL(str(FOLDER / name))
        library.iomm_source_hash.restype = ctypes.c_char_p
        built_from = library.iomm_source_hash().decode()
    except (OSError, AttributeError) as error:
        return None, f"{name} failed to load: {error}"
    if source_hash() not in (None, built_from):
        return None, f"{name} is older than csrc/ ({REBUILD})"
    if device == "cuda":
        library.iomm_error_string.restype = ctypes.c_char_p
        if torch.cuda.is_available() and (code := library.iomm_probe()):
            return None, f"{name} cannot use this GPU: {library.iomm_error_string(code).decode()}"
    return library, None


def why_not(device: str) -> str | None:
    """Return why the native backends cannot run on a device type, or None if they can."""
    return load(device)[1]


def launch(device: torch.device, entry: str, *arguments: Tensor | float | None) -> None:
    """Call the entry point `<entry>_cpu` or `<entry>_cuda`.

    Args:
        device: The device to run on.
        entry: Name of the entry point without its device suffix.
        *arguments: Tensors (contiguous, on `device`) are passed as pointers, None as the null
            pointer, and numbers as int64 or double.

    Raises:
        RuntimeError: The library is missing or the call failed.
    """
    library, reason = load(device.type)
    if library is None:
        raise RuntimeError(f"{entry} has no native backend on {device.type}: {reason}")
    values = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous() and argument.device == device
            values.append(ctypes.c_void_p(argument.data_ptr()))
        elif argument is None:
            values.append(ctypes.c_void_p())
        else:
            values.append(
                ctypes.c_double(argument)
                if isinstance(argument, float)
                else ctypes.c_int64(argument)
            )
    function = getattr(library, f"{entry}_{device.type}")
    if device.type == "cpu":
        code = function(*values, ctypes.c_int64(torch.get_num_threads()))
    else:
        with torch.cuda.device(device):
            code = function(*values, ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream))
    if code:
        reason = (
            library.iomm_error_string(code).decode() if device.type == "cuda" else f"code {code}"
        )
        raise RuntimeError(f"{entry}_{device.type} failed: {reason}")
