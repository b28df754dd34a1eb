"""A start removes truncated libraries that a killed compiler left, and nothing else."""

import ctypes
import shutil
import subprocess

import pytest

from iomm.engine.resilience.inductor_cache import is_whole, remove_half_compiled


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a folder with a library and an object as inductor's compiler makes them."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("built")
    (folder / "f.cpp").write_text('extern "C" int answer() { return 42; }\n')
    for flags, name in ((["-shared", "-fPIC"], "f.so"), (["-c", "-fPIC"], "f.o")):
        subprocess.run(["g++", "-O1", *flags, "-o", folder / name, folder / "f.cpp"], check=True)
    return folder


def test_truncated_library_is_detected_at_any_length(built):
    for name in ("f.so", "f.o"):
        whole = (built / name).read_bytes()
        assert is_whole(built / name)
        for length in (0, 1, 63, 64, 100, len(whole) // 2, len(whole) - 1):
            (built / "cut").write_bytes(whole[:length])
            assert not is_whole(built / "cut"), (name, length)
        # A hole: the size is right, but no data was written.
        (built / "cut").write_bytes(bytes(len(whole)))
        assert not is_whole(built / "cut")


def test_truncated_files_not_being_written_are_removed(built, tmp_path):
    cache = tmp_path / "inductor/ab"
    cache.mkdir(parents=True)
    whole = (built / "f.so").read_bytes()
    (cache / "whole.so").write_bytes(whole)
    (cache / "cut.so").write_bytes(whole[:-1])
    (cache / "cut.o").write_bytes(b"")
    (cache / "kernel.py").write_text("")
    # A compiler still writes this file.
    with open(cache / "growing.so", "wb") as growing:
        growing.write(whole[:100])
        growing.flush()
        assert {path.name for path in remove_half_compiled(tmp_path / "inductor")} == {
            "cut.so",
            "cut.o",
        }
        assert sorted(path.name for path in cache.iterdir()) == [
            "growing.so",
            "kernel.py",
            "whole.so",
        ]
    assert {path.name for path in remove_half_compiled(tmp_path / "inductor")} == {"growing.so"}
    assert remove_half_compiled(tmp_path / "inductor") == []
    assert remove_half_compiled(tmp_path / "nowhere") == []
    assert ctypes.CDLL(str(cache / "whole.so")).answer() == 42
