"""Libraries that a killed compiler left in torch's cache: a start removes what is cut, and nothing else."""

import ctypes
import shutil
import subprocess

import pytest

from iomm.engine.resilience.inductor_cache import is_whole, remove_half_compiled


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A library and an object as inductor's compiler makes them."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("built")
    (folder / "f.cpp").write_text('extern "C" int answer() { return 42; }\n')
    for flags, name in ((["-shared", "-fPIC"], "f.so"), (["-c", "-fPIC"], "f.o")):
        subprocess.run(["g++", "-O1", *flags, "-o", folder / name, folder / "f.cpp"], check=True)
    return folder


def test_every_cut_of_a_library_shows(built):
    for name in ("f.so", "f.o"):
        whole = (built / name).read_bytes()
        assert is_whole(built / name)
        for length in (0, 1, 63, 64, 100, len(whole) // 2, len(whole) - 1):
            (built / "cut").write_bytes(whole[:length])
            assert not is_whole(built / "cut"), (name, length)
        # A hole: its size is right, nothing was written.
        (built / "cut").write_bytes(bytes(len(whole)))
        assert not is_whole(built / "cut")


def test_a_start_removes_what_is_cut_and_nobody_writes(built, tmp_path):
    cache = tmp_path / "inductor/ab"
    cache.mkdir(parents=True)
    whole = (built / "f.so").read_bytes()
    (cache / "whole.so").write_bytes(whole)
    (cache / "cut.so").write_bytes(whole[:-1])
    (cache / "cut.o").write_bytes(b"")
    (cache / "kernel.py").write_text("")
    # A compiler that is alive.
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
    assert (
        remove_half_compiled(tmp_path / "inductor")
        == []
        == remove_half_compiled(tmp_path / "nowhere")
    )
    assert ctypes.CDLL(str(cache / "whole.so")).answer() == 42
