"""Compile pretended_cuda.cpp and load it, before torch is imported."""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_suffix("").with_name("pretended_cuda.cpp")
# Beside other caches of this user, so that a second run need not compile (20 s on one core).
CACHE = Path(tempfile.gettempdir()) / f"iomm-pretended-cuda-{os.getuid()}"


def why_not() -> str | None:
    """Return why the library cannot be built or used here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    if "+cpu" not in version("torch"):
        return "needs a CPU build of torch, because a CUDA build has its own device"
    return None


def build() -> Path:
    """Return the library for this version of torch, compiled if it is not in the cache yet."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    digest = hashlib.sha256(SOURCE.read_bytes() + str(torch_folder).encode()).hexdigest()[:16]
    library = CACHE / f"{version('torch')}-{digest}.so"
    CACHE.mkdir(mode=0o700, exist_ok=True)
    # Several processes may ask for it at the same time.
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = library.with_suffix(".partial")
            include = torch_folder / "include"
            flags = [
                "-O1",
                "-std=c++20",
                "-shared",
                "-fPIC",
                f"-I{include}",
                f"-I{include / 'torch/csrc/api/include'}",
                f"-L{torch_folder / 'lib'}",
                f"-Wl,-rpath,{torch_folder / 'lib'}",
            ]
            subprocess.run(
                ["g++", *flags, SOURCE, "-o", partial, "-lc10", "-ltorch_cpu"], check=True
            )
            partial.rename(library)
    return library


def load() -> None:
    """Load the library into this process."""
    assert "torch" not in sys.modules, "ATen looks for CUDA when torch is imported"
    ctypes.CDLL(str(build()))
