"""Installs IOMM and compiles csrc/ into two plain shared libraries, without torch.

    libiomm_cpu.so, libiomm_cpu_v3.so   g++, for any x86-64 and for those with AVX2; the same bits, chosen when loaded
    libiomm_cuda.so                     nvcc, where there is one: sm_80, sm_90a, and PTX for what comes later

They lie in kernels/lib/ (package iomm.kernels), beside build.json, which says what was built and what was left out, and
why. `CXX` and `NVCC` name other compilers. Nothing is contracted to FMA (-ffp-contract=off, -fmad=false), so that CPUs
and GPUs draw the same noise.
"""

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
# Files and archs side by side.
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC,-Wall", "--threads", "0"]
# H100 and H200 are 9.0 and run sm_90a code; the PTX is what Blackwell and later compile for themselves.
CUDA_ARCHS = {
    "sm_80": ["-gencode", "arch=compute_80,code=sm_80"],
    "sm_90a": ["-gencode", "arch=compute_90a,code=sm_90a"],
    "compute_90": ["-gencode", "arch=compute_90,code=compute_90"],
}


class BuildError(RuntimeError):
    """A compiler is there but refused our sources."""


def source_hash(csrc=CSRC):
    """SHA-256 over names and bytes of csrc/, first 16 hex digits; kernels/native.py computes the same."""
    digest = hashlib.sha256()
    for path in sorted(csrc.iterdir()):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_nvcc():
    """Path of nvcc, or None: $NVCC, PATH, $CUDA_HOME, /usr/local/cuda."""
    toolkit = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    places = [os.environ.get("NVCC"), "nvcc", os.path.join(toolkit, "bin", "nvcc")]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def compiler_version(compiler):
    """Name and version, as "g++ 12.2.0" or "nvcc 13.0.88"."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    line = next((line for line in said.splitlines() if "release" in line), said.partition("\n")[0])
    return f"{Path(compiler).name} {(re.findall(r'[0-9]+(?:[.][0-9]+)+', line) or ['of unknown version'])[-1]}"


def compile_library(command, target):
    """Runs the compiler into another name and moves the result over `target`: who has the old file loaded keeps it."""
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        said = (done.stderr or done.stdout).strip().splitlines()
        error = next(
            (line for line in said if "error" in line),
            said[-1] if said else f"exit status {done.returncode}",
        )
        raise BuildError(f"{Path(command[0]).name}: {error.strip()}")
    os.replace(unfinished, target)


def build_native(folder):
    """Compiles csrc/ into `folder` and returns what it writes to build.json there. Raises BuildError if g++ fails."""
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
            f"no {os.environ.get('CXX') or 'g++'} found: install g++ and repeat"
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
        missing["libiomm_cuda.so"] = (
            "no nvcc found (CUDA toolkit); it is needed only to train on a GPU"
        )
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


def summary(facts):
    """One line: what was built and what was left out and why."""
    built = [
        f"{name} ({fact['arch']}; {fact['compiler']})" for name, fact in facts["built"].items()
    ]
    left_out = [f"{name} ({reason})" for name, reason in facts["missing"].items()]
    return (
        f"iomm: built {', '.join(built) or 'nothing'}; left out {', '.join(left_out) or 'nothing'}"
    )


class NativeBuild(build_ext):
    """`build_ext` that calls the two compilers by hand: the libraries are no Python modules and know no torch."""

    def folder(self):
        if self.inplace or self.editable_mode:
            return ROOT / "kernels" / "lib"
        return Path(self.build_lib, "iomm", "kernels", "lib")

    def run(self):
        try:
            line = summary(build_native(self.folder()))
        except BuildError as error:
            raise SystemExit(f"iomm native build failed: {error}") from None
        print(line)
        # Pip swallows the output of a build that went well.
        try:
            Path("/dev/tty").write_text(line + "\n")
        except OSError:
            pass

    def get_outputs(self):
        return (
            []
            if self.inplace or self.editable_mode
            else [str(path) for path in self.folder().glob("*")]
        )

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.iterdir())]


class NativeWheel(bdist_wheel):
    """The libraries bind to a platform, not to a Python version."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def packages():
    """Package name -> folder, for every folder of the three trees that holds code or data."""
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
    readme = ROOT / "README.md"
    setup(
        name="iomm",
        version="0.1.0",
        description="Image-only training for unified multimodal models",
        long_description=readme.read_text() if readme.exists() else "",
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.11",
        packages=list(packages()),
        package_dir=packages(),
        package_data={"": ["*.yaml", "*.json", "*.safetensors", "*.txt"]},
        ext_modules=[Extension("iomm.kernels.lib.native", sources=[])],
        cmdclass={"build_ext": NativeBuild, "bdist_wheel": NativeWheel},
        entry_points={"console_scripts": ["iomm = iomm.engine.cli:main"]},
        install_requires=[
            "torch>=2.13",
            "deepspeed>=0.19",
            "transformers>=5.17",
            "diffusers>=0.38",
            "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'",
            "triton>=3.6; platform_system == 'Linux'",
            "safetensors>=0.8",
            "numpy>=2",
            "pillow>=11",
            "pyyaml>=6",
            "matplotlib>=3.9",
            "tensorboard>=2.18",
            "tqdm>=4.66",
        ],
        extras_require={
            "test": [
                "pytest>=8.3",
                "pytest-xdist>=3.6",
                "pytest-benchmark>=5",
                "hypothesis>=6.100",
            ],
            "bench": ["pytest-benchmark>=5"],
            "gpu": ["flash-attn>=2.8"],
            # For log.wandb=true
            "wandb": ["wandb>=0.19"],
            # Beside nvidia-dali-cuda130, not instead of it: engine/README.md explains how to exchange them.
            "cuda12": ["nvidia-dali-cuda120>=2.4; platform_system == 'Linux'"],
        },
    )
