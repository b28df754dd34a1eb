"""Compile csrc/ into plain shared libraries without torch, and list the packages.

    libiomm_cpu.so      g++, any x86-64
    libiomm_cpu_v3.so   g++, x86-64 with AVX2; the same bits, chosen when the library is loaded
    libiomm_cuda.so     nvcc, where it is found: sm_80, sm_90a, and PTX for later architectures

The libraries are written to kernels/lib/ (package iomm.kernels) together with build.json, which
records what was built, what was left out, and why. `CXX` and `NVCC` select other compilers.
Floating-point contraction is off (-ffp-contract=off, -fmad=false), so CPUs and GPUs draw the
same noise. The metadata is in pyproject.toml.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror=vla",
]
# --threads 0 compiles files and architectures in parallel.
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC,-Wall", "--threads", "0"]
# H100 and H200 have compute capability 9.0 and run sm_90a code. The driver compiles the PTX on
# Blackwell and later.
CUDA_ARCHS = {
    "sm_80": ["-gencode", "arch=compute_80,code=sm_80"],
    "sm_90a": ["-gencode", "arch=compute_90a,code=sm_90a"],
    "compute_90": ["-gencode", "arch=compute_90,code=compute_90"],
}


class BuildError(RuntimeError):
    """A compiler was found but failed on our sources."""


def source_hash(csrc: Path = CSRC) -> str:
    """Return the first 16 hex digits of the SHA-256 over names and bytes of csrc/.

    kernels/native.py computes the same value to detect a stale build.
    """
    digest = hashlib.sha256()
    for path in sorted(csrc.iterdir()):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    """Return the path of nvcc from $NVCC, PATH, $CUDA_HOME or /usr/local/cuda, or None."""
    toolkit = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    places = [os.environ.get("NVCC"), "nvcc", os.path.join(toolkit, "bin", "nvcc")]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def compiler_version(compiler: str) -> str:
    """Return name and version, such as "g++ 12.2.0" or "nvcc 13.0.88"."""
    output = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    first = output.partition("\n")[0]
    line = next((line for line in output.splitlines() if "release" in line), first)
    versions = re.findall(r"[0-9]+(?:[.][0-9]+)+", line)
    return f"{Path(compiler).name} {versions[-1] if versions else 'of unknown version'}"


def compile_library(command: list[str], target: Path) -> None:
    """Compile into a temporary file and move it over `target`.

    A process that has the old library loaded keeps it. Raises BuildError with the compiler's first
    error line.
    """
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        output = (done.stderr or done.stdout).strip().splitlines()
        error = next(
            (line for line in output if "error" in line),
            output[-1] if output else f"exit status {done.returncode}",
        )
        raise BuildError(f"{Path(command[0]).name}: {error.strip()}")
    os.replace(unfinished, target)


def build_native(folder: Path | str) -> dict:
    """Compile csrc/ into `folder` and return the contents of its build.json.

    A failure of nvcc is recorded. A failure of g++ raises BuildError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    define = f"-DIOMM_SOURCE_HASH={source_hash()}"
    built, missing = {}, {}

    cxx = shutil.which(os.environ.get("CXX") or "g++")
    names = {"libiomm_cpu.so": []}
    if platform.machine() in ("x86_64", "AMD64"):
        names["libiomm_cpu_v3.so"] = ["-march=x86-64-v3"]
    if cxx is None:
        missing["libiomm_cpu.so"] = (
            f"no {os.environ.get('CXX') or 'g++'} found; install g++ and repeat"
        )
        names = {}
    for name, flags in names.items():
        compile_library(
            [cxx, *CXX_FLAGS, *flags, define, *map(str, sorted(CSRC.glob("*.cpp")))], folder / name
        )
        arch = flags[0].removeprefix("-march=") if flags else "baseline"
        built[name] = {"compiler": compiler_version(cxx), "arch": arch}

    nvcc = find_nvcc()
    if nvcc is None:
        missing["libiomm_cuda.so"] = "no nvcc found (CUDA toolkit); only training on a GPU needs it"
    else:
        archs = [flag for flags in CUDA_ARCHS.values() for flag in flags]
        try:
            compile_library(
                [
                    nvcc,
                    *NVCC_FLAGS,
                    *archs,
                    "-shared",
                    define,
                    *map(str, sorted(CSRC.glob("*.cu"))),
                ],
                folder / "libiomm_cuda.so",
            )
            built["libiomm_cuda.so"] = {
                "compiler": compiler_version(nvcc),
                "arch": " ".join(CUDA_ARCHS),
            }
        except BuildError as error:
            missing["libiomm_cuda.so"] = str(error)

    for path in folder.glob("libiomm_*.so"):
        if path.name not in built:
            path.unlink()
    facts = {"source_hash": source_hash(), "built": built, "missing": missing}
    (folder / "build.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def summary(facts: dict) -> str:
    """Return one line with what was built, what was left out, and why."""
    built = [
        f"{name} ({fact['arch']}; {fact['compiler']})" for name, fact in facts["built"].items()
    ]
    left_out = [f"{name} ({reason})" for name, reason in facts["missing"].items()]
    return (
        f"iomm: built {', '.join(built) or 'nothing'}; left out {', '.join(left_out) or 'nothing'}"
    )


class NativeBuild(build_ext):
    """`build_ext` that calls both compilers directly.

    The libraries are neither Python modules nor linked against torch.
    """

    def folder(self) -> Path:
        if self.inplace or self.editable_mode:
            return ROOT / "kernels" / "lib"
        return Path(self.build_lib, "iomm", "kernels", "lib")

    def run(self) -> None:
        try:
            line = summary(build_native(self.folder()))
        except BuildError as error:
            raise SystemExit(f"iomm native build failed: {error}") from None
        print(line)
        # pip hides the output of a successful build.
        with contextlib.suppress(OSError):
            Path("/dev/tty").write_text(line + "\n")

    def get_outputs(self) -> list[str]:
        if self.inplace or self.editable_mode:
            return []
        return [str(path) for path in self.folder().glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.iterdir())]


class NativeWheel(bdist_wheel):
    """A wheel that depends on the platform, not on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def packages() -> dict[str, str]:
    """Return package name -> folder for every folder of the three trees that holds code or data."""
    found = {}
    for name, top in (("iomm", "iomm"), ("iomm.kernels", "kernels"), ("iomm.engine", "engine")):
        for folder in [
            ROOT / top,
            *sorted(path for path in (ROOT / top).rglob("*") if path.is_dir()),
        ]:
            parts = folder.relative_to(ROOT / top).parts
            if folder != ROOT / top and (
                "lib" in parts or "__pycache__" in parts or not any(folder.glob("*.*"))
            ):
                continue
            found[".".join((name, *parts))] = str(folder.relative_to(ROOT))
    return found


if __name__ == "__main__":
    setup(
        packages=list(packages()),
        package_dir=packages(),
        package_data={"": ["*.yaml", "*.json", "*.safetensors", "*.txt"]},
        ext_modules=[Extension("iomm.kernels.lib.native", sources=[])],
        cmdclass={"build_ext": NativeBuild, "bdist_wheel": NativeWheel},
    )
