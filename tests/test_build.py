"""Build tests.

setup.py compiles csrc/ without torch and reports what it could not build. CUDA kernels compile
without spills or warnings.
"""

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch.nn.attention import SDPBackend, sdpa_kernel

from iomm.engine.observe import doctor
from iomm.kernels import native

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup_py():
    """Return setup.py as a module. It calls setup() only when run as a script."""
    spec = importlib.util.spec_from_file_location("iomm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_records_nvcc_failure_and_raises_on_gxx_failure(setup_py, tmp_path, monkeypatch):
    """A failure of nvcc is recorded, and a failure of g++ is an error.

    nvcc fails, for example, if it is old or does not support the host compiler. The C++ library
    is still built.
    """
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: "/bin/false")
    monkeypatch.setattr(setup_py, "CXX_FLAGS", [*setup_py.CXX_FLAGS, "-O0"])
    facts = setup_py.build_native(tmp_path)
    assert json.loads((tmp_path / "build.json").read_text()) == facts
    assert (
        "libiomm_cpu.so" in facts["built"]
        and facts["missing"]["libiomm_cuda.so"] == "false: exit status 1"
    )
    line = setup_py.summary(facts)
    assert "\n" not in line and "libiomm_cpu.so" in line and "libiomm_cuda.so" in line
    for name in facts["built"]:
        library = ctypes.CDLL(str(tmp_path / name))
        library.iomm_source_hash.restype = ctypes.c_char_p
        assert library.iomm_source_hash().decode() == facts["source_hash"] == native.source_hash()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(setup_py.BuildError, match="false: exit status 1"):
        setup_py.build_native(tmp_path)


def test_build_records_missing_compilers(setup_py, tmp_path, monkeypatch):
    (tmp_path / "libiomm_cpu_v3.so").touch()
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    facts = setup_py.build_native(tmp_path)
    assert facts["built"] == {} and "no-such-compiler" in facts["missing"]["libiomm_cpu.so"]
    assert "no nvcc found" in facts["missing"]["libiomm_cuda.so"]
    # Libraries of an earlier build are removed.
    assert [path.name for path in tmp_path.iterdir()] == ["build.json"]


def test_packages_lists_every_package(setup_py):
    listed = setup_py.packages()
    for path in [
        *ROOT.glob("iomm/**/*.py"),
        *ROOT.glob("kernels/**/*.py"),
        *ROOT.glob("engine/**/*.py"),
        *ROOT.glob("engine/configs/*.yaml"),
    ]:
        assert str(path.parent.relative_to(ROOT)) in listed.values(), path
    assert listed["iomm.kernels"] == "kernels" and listed["iomm.engine"] == "engine"
    assert not any("lib" in name.split(".") for name in listed)


def test_setup_runs_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import runpy; runpy.run_path('setup.py', run_name='recipe')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc").glob("*.cu")))
def test_cuda_kernels_compile_without_spills_or_warnings(setup_py, source, tmp_path):
    nvcc = setup_py.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    archs = [*setup_py.CUDA_ARCHS["sm_80"], *setup_py.CUDA_ARCHS["sm_90a"]]
    command = [
        nvcc,
        *setup_py.NVCC_FLAGS,
        *archs,
        "-DIOMM_SOURCE_HASH=test",
        "-Xptxas",
        "-v",
        "-c",
        str(ROOT / "csrc" / source),
        "-o",
        str(tmp_path / "out.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "warning" not in output, output
    assert all(f"for '{arch}'" in output for arch in ("sm_80", "sm_90a"))
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output
    )
    assert spills and set(spills) == {("0", "0", "0")}, output


def test_doctor_reports_every_component(monkeypatch, tmp_path, capsys):
    rows = doctor.rows()
    assert {
        "torch",
        "CUDA device",
        "attention",
        "DeepSpeed",
        "DALI",
        "Triton",
        "flash-attn",
        "NVIDIA apex",
        "nvcc",
        "g++",
        "C++ ops",
        "CUDA ops",
    } <= {row[0] for row in rows}
    for _, version, state, note in rows:
        assert (
            version and state in ("present", "absent", "problem") and (note or state == "present")
        )
    doctor.print_report()
    assert "NVIDIA apex" in capsys.readouterr().out


def test_machine_facts_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.machine()["commit"] == "unknown" and doctor.machine()["torch"]


def test_doctor_names_the_attention_backend(monkeypatch):
    """The backend is the one that PyTorch would run, and a slow one on Hopper is a problem."""
    with sdpa_kernel(SDPBackend.MATH):
        assert doctor.sdpa_backend() == doctor.machine()["attention"] == "math"
    assert doctor.sdpa_backend() != "math"
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_capability", lambda: (9, 0))
    for backend, state in ("flash_attention", "problem"), ("cudnn_attention", "present"):
        monkeypatch.setattr(doctor, "sdpa_backend", lambda backend=backend: backend)
        assert doctor.attention_row()[2] == state and backend in doctor.attention_row()[3]


def test_deepspeed_with_a_nan_race_is_excluded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = next(
        Requirement(line) for line in project["dependencies"] if line.startswith("deepspeed")
    )
    assert "0.19.2" not in needed.specifier and "0.19.3" in needed.specifier


def test_machine_facts_record_dali_version_or_none(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", {"nvidia-dali-cuda130": "1.51", "torch": "2"}.get)
    assert doctor.machine()["dali"] == "1.51"
    monkeypatch.setattr(doctor, "version_of", {}.get)
    assert doctor.machine()["dali"] is None


def test_doctor_distinguishes_nvidia_apex_from_unrelated_apex(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.apex_row()[2] == "absent" and "unrelated" in doctor.apex_row()[3]
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").write_text("class FusedAdam:\n    pass\n")
    assert doctor.apex_row()[2] == "present"


def test_doctor_reports_conflicting_dali_wheels(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.4.0")
    monkeypatch.setattr(doctor, "find", lambda name: object())
    assert doctor.dali_row()[2] == "problem" and "overwrite" in doctor.dali_row()[3]


def test_native_rejects_library_older_than_its_sources(monkeypatch):
    if native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    monkeypatch.setattr(native, "source_hash", lambda: "another")
    native.load.cache_clear()
    try:
        assert "older than csrc/" in native.why_not("cpu")
        assert next(row for row in doctor.native_rows() if row[0] == "C++ ops")[2] == "problem"
    finally:
        monkeypatch.undo()
        native.load.cache_clear()
    assert os.path.exists(native.FOLDER / native.cpu_library_name())
