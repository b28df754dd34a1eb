"""A run means the same files wherever one stands, and its cache has a place to be written."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from launches import PIXELS, ROOT, environment
from PIL import Image

from iomm.config import InputError
from iomm.engine import builders, launch
from iomm.engine.cli import main as iomm
from iomm.engine.config import differences, load_config, parse
from iomm.engine.data.patterns import absolute, expand


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return the folder in which a run with relative names was started."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "photos").mkdir()
    draws = np.random.default_rng(0)
    for n in range(5):
        pixels = draws.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photos/{n}.jpg")
    words = ["run.dir=runs/x", "data.shards=photos", "train.steps=1", "train.global_batch=4"]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "engine/launch.py"),
            "--config",
            PIXELS,
            "log.sample_images=0",
            *words,
        ],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Return another folder, which is the current one, with other images of the same name."""
    (tmp_path / "photos").mkdir()
    for n in range(2):
        Image.new("RGB", (48, 48), (n, n, n)).save(tmp_path / f"photos/{n}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(run_dir, *words):
    return iomm(["sample", "--run", str(run_dir), "--num", "2", "--steps", "1", *words])


def test_names_are_saved_as_absolute_ones(started):
    saved = yaml.safe_load((started / "runs/x/config.yaml").read_text())
    assert saved["run"]["dir"] == str(started / "runs/x")
    assert saved["data"]["shards"] == str(started / "photos")
    assert saved["model"]["mllm"] == "shapes" and saved["model"]["vae"] == "pixel:2"


def test_a_run_is_sampled_from_another_folder(started, elsewhere):
    assert sample(started / "runs/x", "--out", "grid.png") == 0
    assert sorted(os.listdir(elsewhere)) == ["grid", "grid.png", "photos"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_config_of_an_earlier_version_works(started, elsewhere, moved, tmp_path_factory):
    """Its names are relative to the folder in which the run was started."""
    folder = tmp_path_factory.mktemp("moved") if moved else started
    old = folder / "runs/old"
    shutil.copytree(started / "runs/x", old)
    if moved:
        shutil.copytree(started / "photos", folder / "photos")
    config = yaml.safe_load((old / "config.yaml").read_text())
    config["run"]["dir"], config["data"]["shards"] = "runs/old", "photos"
    del config["cache"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    assert sample(old) == 0 and sorted(os.listdir(elsewhere)) == ["photos"]
    # It is resumed, and the new spelling is no other value.
    words = [f"run.dir={old}", f"data.shards={folder}/photos", "train.global_batch=4"]
    given = builders.resolved(load_config(PIXELS, [*words, "train.steps=2", "log.sample_images=0"]))
    launch.open_run_dir(given, launch.parse_args(["--resume", "auto"]))


def test_other_images_of_the_same_name_are_refused(started, elsewhere, capsys):
    shutil.copytree(started / "runs/x", elsewhere / "runs/x")
    path = elsewhere / "runs/x/config.yaml"
    path.write_text(path.read_text().replace(str(started / "photos"), "photos"))
    assert sample(elsewhere / "runs/x") == 2
    message = f"{elsewhere}/photos holds 2 images, which are not the 5 that "
    assert message in capsys.readouterr().err


def test_resuming_compares_names_by_what_they_lead_to(started, monkeypatch):
    monkeypatch.chdir(started)
    (started / "link").symlink_to("runs")
    old = parse("", overrides=["run.init=runs/x", "data.shards=photos", "model.vae=pixel:2"])
    for init in ("./runs/x", str(started / "runs/x"), f"{started}/runs/../runs/x/", "link/x"):
        new = builders.resolved(parse(old.to_yaml(), overrides=[f"run.init={init}"]))
        assert differences(new, old) == [], init
    assert differences(parse(old.to_yaml(), overrides=["run.init=runs/y"]), old)
    # A project that was moved, and one in which another run has the place.
    moved = parse(old.to_yaml(), overrides=["run.init=/old/place/runs/x"])
    assert differences(new, moved) == [] and differences(moved, new)
    assert differences(parse(old.to_yaml(), overrides=["data.shards=x", "cache.dir=y"]), old) == []


def test_patterns_are_resolved_part_by_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("0.tar", "1.tar", "a,b.tar"):
        (tmp_path / name).touch()
    assert absolute("{0..1}.tar, ../x/*.tar") == (
        f"{tmp_path}/{{0..1}}.tar,{tmp_path.parent}/x/*.tar"
    )
    assert absolute("a,b.tar") == f"{tmp_path}/a,b.tar"
    assert absolute("~/x.tar") == os.path.expanduser("~/x.tar")
    for pattern in ("{0..1}.tar", "0.tar,1.tar", "a,b.tar", "*.tar"):
        assert expand(absolute(pattern)) == expand(pattern)


def config_with(run_dir, *overrides):
    return load_config(PIXELS, [f"run.dir={run_dir}", "data.num_images=32", *overrides])


def test_cache_dir_is_used(tmp_path):
    config = config_with(tmp_path / "runs/x", f"cache.dir={tmp_path}/own")
    folder = builders.prepare_data(config, progress=False)
    assert folder.startswith(f"{tmp_path}/own/index/") and os.listdir(tmp_path) == ["own"]
    assert builders.find_data(config) == folder


def test_cache_falls_back_with_a_message(tmp_path, monkeypatch, caplog):
    """Root may write anywhere but into a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/shared").touch()
    config = config_with(tmp_path / "runs/x")
    folder = builders.prepare_data(config, progress=False)
    assert folder.startswith(f"{tmp_path}/runs/x/shared/")
    (message,) = caplog.messages
    assert f"{tmp_path}/runs/shared cannot be written" in message and "Set cache.dir" in message
    # A run in a folder that cannot be written either, as `iomm sample` may find it.
    (tmp_path / "read-only").touch()
    config = config_with(tmp_path / "read-only/x")
    assert builders.prepare_data(config, progress=False).startswith(f"{tmp_path}/home/iomm/")
    caplog.clear()
    # What is there already needs no permission.
    assert builders.prepare_data(config, progress=False) and not caplog.messages


def test_a_link_to_a_run_means_the_run(started, elsewhere):
    link = elsewhere / "latest"
    link.symlink_to(started / "runs/x")
    assert sample(link, "--out", "grid.png") == 0
    assert sorted(os.listdir(elsewhere)) == ["grid", "grid.png", "latest", "photos"]


def test_a_process_without_a_home_has_a_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda name: name)
    *_, last = builders.cache_folders(config_with(tmp_path / "x"))
    assert last.is_absolute() and last.name == "iomm"
    given = builders.resolved(config_with("~no-such-user/x"))
    assert given.run.dir == os.path.abspath("~no-such-user/x")


def test_cache_dir_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    config = config_with(tmp_path / "x", f"cache.dir={tmp_path}/file/cache")
    with pytest.raises(InputError, match=r"file/cache cannot be written .*Set cache\.dir"):
        launch.open_run_dir(config, launch.parse_args([]))
