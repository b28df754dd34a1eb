"""Checkpoints survive crashes, damage, full disks, failing removals and other world sizes."""

import errno
import itertools
import json
import logging
import os
import resource
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults.disk import (
    FACTS,
    Together,
    crash_points,
    damages,
    hidden,
    newest_step,
    pieces,
    retention,
    save_all,
    saver,
)
from faults.real import real_world_sizes
from faults.toy_job import Job
from faults.trials import (
    bitwise_resumes,
    damaged_starts,
    final_files,
    kill_chain,
    log_rows,
    world_sizes,
)
from safetensors.torch import load_file

from iomm.config import InputError
from iomm.engine.builders import data_facts
from iomm.engine.config import parse
from iomm.engine.data.index import build
from iomm.engine.data.mixture import Joined
from iomm.engine.data.shards import Shards
from iomm.engine.launch import start_from
from iomm.engine.loop import completed_save
from iomm.engine.resilience import checkpoint_reader, checkpoint_writer
from iomm.engine.resilience.checkpoint_interval import plan
from iomm.engine.resilience.watchdog import DEAD
from iomm.engine.shapes.dataset import write_dataset


def test_save_writes_the_values_at_the_time_of_the_call(tmp_path):
    """The tensors of 50 saves are overwritten as soon as save() returns."""

    def work(rank):
        one = saver(tmp_path, rank)
        for step in range(1, 26):
            tensors = pieces(rank.rank, step, numel=20_000)
            expected = {key: t.clone() for key, t in tensors.items()}
            one.save(step, tensors, FACTS)
            for t in tensors.values():
                t.fill_(float("nan"))
            stored = load_file(one.wait() / f"rank-{rank.rank:05d}-of-00002.safetensors")
            assert stored.keys() == expected.keys()
            assert all(torch.equal(stored[key], expected[key]) for key in expected)
        return True

    assert Together(2).run(work) == [True, True]
    assert [
        checkpoint_reader.step_of(p) for p in checkpoint_reader.steps(tmp_path / "checkpoints")
    ] == [24, 25]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_error_in_the_loop_waits_for_the_save_in_flight(tmp_path, monkeypatch, error):
    """A save of half a second has begun when the next step fails on one of two ranks."""
    write_piece = checkpoint_writer.write_piece

    def slowly(*args):
        time.sleep(0.5)
        return write_piece(*args)

    monkeypatch.setattr(checkpoint_writer, "write_piece", slowly)
    paused = []

    def work(rank):
        one = saver(tmp_path, rank)
        one.save(3, pieces(rank.rank, 3), FACTS)
        if rank.rank:
            one.wait()
            return newest_step(tmp_path)
        watchdog = SimpleNamespace(pause=lambda: paused.append(newest_step(tmp_path)))
        with pytest.raises(error, match="a step failed"), completed_save(one, watchdog):
            raise error("a step failed")
        return newest_step(tmp_path)

    assert Together(2).run(work) == [3, 3] and paused == [0]


def test_every_crash_point_of_a_save_is_safe(tmp_path):
    found = crash_points(tmp_path)
    assert (
        found["recovered"] == found["crash_points"]
        and min(found["of_rank_0"], found["of_rank_1"]) >= 10
    ), found


def test_damaged_checkpoint_is_skipped_for_the_previous_one(tmp_path):
    found = damages(tmp_path, num_flips=300)
    assert (
        found["detected"] == found["fell_back"] == found["cases"]
        and found["of_them_single_bits"] == 3 * 300
    ), found


def test_renamed_checkpoint_is_skipped(tmp_path):
    for step in (2, 4):
        save_all(tmp_path, step)
    root = tmp_path / "checkpoints"
    (root / "step-00000004").rename(root / "step-00000009")
    assert newest_step(tmp_path) == 2


def test_rollback_sets_later_checkpoints_aside(tmp_path, caplog):
    """After --resume with an earlier checkpoint, auto must not find the later ones."""
    caplog.set_level(logging.INFO, "iomm")
    for step in (2, 4, 6):
        save_all(tmp_path, step, keep=9)
    root = tmp_path / "checkpoints"
    for turn in range(2):
        caplog.clear()
        checkpoint_writer.set_aside(root, 2)
        assert newest_step(tmp_path) == 2 and len(list(root.glob("abandoned-step-*"))) == 2 + turn
        assert len(caplog.messages) == 1 and caplog.messages[0].startswith(
            f"checkpoints of steps {'4' if turn else '4, 6'} renamed to {root}/abandoned"
        )
        save_all(tmp_path, 4, keep=9)
    assert newest_step(tmp_path) == 4


def test_step_committed_again_replaces_other_bits(tmp_path, monkeypatch):
    """A checkpoint with the same bits is left as it is. One with other bits is replaced."""
    folder = save_all(tmp_path, 4)[0]
    inode, before = folder.stat().st_ino, checkpoint_reader.read_manifest(folder)["files"]
    assert (
        save_all(tmp_path, 4) == [folder] * 2
        and folder.stat().st_ino == inode
        and not hidden(tmp_path)
    )
    monkeypatch.setitem(save_all.__globals__, "pieces", lambda rank, step: pieces(rank, step + 1))
    assert save_all(tmp_path, 4) == [folder] * 2 and not hidden(tmp_path)
    assert (
        checkpoint_reader.read_manifest(folder)["files"] != before
        and checkpoint_reader.damage(folder) is None
    )
    assert load_file(folder / "rank-00001-of-00002.safetensors")["master/w"].equal(
        pieces(1, 5)["master/w"]
    )


@pytest.mark.slow
def test_start_after_damage_ends_with_the_same_bits(tmp_path):
    found = damaged_starts(tmp_path)
    assert (
        found["went_on_from_the_one_before_and_ended_at_the_same_bits"] == found["starts"] == 12
    ), found


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "rank-00000-of-00001.pt",
        "x/rank-00000-of-00001.safetensors",
    ],
)
def test_manifest_cannot_name_files_outside_its_folder(name, tmp_path):
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "MANIFEST.json").write_bytes(
        checkpoint_reader.seal(
            {
                "format": checkpoint_writer.FORMAT,
                "step": 1,
                "world_size": 1,
                "files": {name: {"bytes": 0, "sha256": ""}},
            }
        )
    )
    with pytest.raises(InputError, match=r"no intact MANIFEST\.json"):
        checkpoint_reader.read_manifest(folder)
    (folder / "MANIFEST.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"no intact MANIFEST\.json"):
        checkpoint_reader.read_manifest(folder)


def test_ranks_that_see_different_folders_all_refuse(tmp_path):
    """The newest checkpoint does not exist for one rank, therefore no rank may use it (C7)."""
    for step in (2, 4):
        save_all(tmp_path / "a", step)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step-00000004")
    link = tmp_path / "seen"
    problems = Together(2).run(
        lambda rank: checkpoint_reader.verify(
            tmp_path / "ab"[rank.rank] / "checkpoints/step-00000004", rank
        )
    )
    assert problems[0] == problems[1] and "no intact MANIFEST.json" in problems[0]
    assert not link.exists()


class Failing:
    """Make one kind of operation raise an OSError on paths that contain `part`.

    A write fails after `offset` bytes.
    """

    def __init__(self, monkeypatch, operation, part, number, offset=0):
        self.armed = True

        def fail(path):
            if self.armed and part in str(path):
                raise OSError(number, os.strerror(number), str(path))

        if operation == "write":
            real_open = open

            def opened(path, mode="r", **kwargs):
                file = real_open(path, mode, **kwargs)
                if "x" not in mode or part not in str(path):
                    return file
                real_write, room = file.write, [offset]

                class Full:
                    def __getattr__(self, name):
                        return getattr(file, name)

                    def __enter__(self):
                        return self

                    def __exit__(self, *_):
                        file.close()

                    def write(self, data):
                        data = memoryview(data).cast("B")
                        real_write(data[: room[0]] if self_.armed else data)
                        room[0] -= len(data)
                        if room[0] < 0:
                            fail(path)

                self_ = self
                return Full()

            monkeypatch.setattr(checkpoint_writer, "open", opened, raising=False)
        elif operation == "fsync":
            real = os.fsync

            def fsync(handle):
                fail(os.readlink(f"/proc/self/fd/{handle}"))
                return real(handle)

            monkeypatch.setattr(os, "fsync", fsync)
        elif operation == "read":
            real_hash = checkpoint_reader.sha256

            def sha256(path, **kwargs):
                if kwargs:
                    fail(path)
                return real_hash(path, **kwargs)

            monkeypatch.setattr(checkpoint_writer, "sha256", sha256)
        else:
            real_call = getattr(os, operation)

            def call(path, *rest, **kwargs):
                fail(path)
                return real_call(path, *rest, **kwargs)

            monkeypatch.setattr(os, operation, call)


DISKS = [
    *[
        ("write", "rank-0000", errno.ENOSPC, offset)
        for offset in (0, 4, 8, 100, 400, 5000, 12_000, 20_000, 36_000)
    ],
    ("write", "rank-00001", errno.ENOSPC, 9000),
    ("write", "MANIFEST", errno.ENOSPC, 50),
    ("write", "rank-00000", errno.EIO, 70),
    ("mkdir", ".tmp-", errno.EACCES, 0),
    ("rename", ".tmp-", errno.EACCES, 0),
    ("rename", ".tmp-", errno.EIO, 0),
    ("fsync", "rank-00001", errno.EIO, 0),
    ("fsync", "MANIFEST", errno.EIO, 0),
    ("read", "rank-00000", errno.EIO, 0),
    ("limit", "", errno.EFBIG, 1000),
    ("limit", "", errno.EFBIG, 30_000),
]


@pytest.mark.parametrize("operation, part, number, offset", DISKS)
def test_failing_disk_costs_one_save(
    operation, part, number, offset, tmp_path, monkeypatch, caplog
):
    """A disk fails in 20 ways."""
    if operation == "limit":

        def arm(on):
            resource.setrlimit(
                resource.RLIMIT_FSIZE,
                (offset if on else resource.RLIM_INFINITY, resource.RLIM_INFINITY),
            )
    else:
        disk = Failing(monkeypatch, operation, part, number, offset)

        def arm(on):
            disk.armed = on

    arm(False)
    save_all(tmp_path, 2)
    one_save_fails(tmp_path, arm, number, caplog)


@pytest.mark.parametrize("num_pages", range(0, 20, 2))
def test_full_file_system_costs_one_save(num_pages, tmp_path, caplog):
    """A real file system in memory has only num_pages free pages.

    Both ranks write 9 pages, and the manifest is the 19th.
    """

    def mount(*options):
        return (
            subprocess.run(
                ["mount", *options, "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True
            ).returncode
            == 0
        )

    if not mount("-o", "size=1m"):
        pytest.skip(
            "this user may not mount a file system; the test above fails in the same places"
        )
    try:
        save_all(tmp_path, 2)
        used = os.statvfs(tmp_path)
        used = (used.f_blocks - used.f_bfree) * used.f_bsize // 4096
        one_save_fails(
            tmp_path,
            lambda on: mount("-o", f"remount,size={4096 * (used + num_pages) if on else 2**20}"),
            errno.ENOSPC,
            caplog,
        )
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def one_save_fails(run_dir, arm, number, caplog):
    """Check that two ranks fail to save step 4 and succeed to save step 6.

    arm(True) makes saves fail, and arm(False) makes them work. After the failure, the checkpoint of
    step 2 remains, nothing partial does, one line is logged, and training continues.
    """
    caplog.clear()

    def work(rank):
        one = saver(run_dir, rank)
        for step in (4, 6):
            rank.group.barrier.wait()
            if rank.first:
                arm(step == 4)
            rank.group.barrier.wait()
            one.save(step, pieces(rank.rank, step), FACTS)
            folder = one.wait()
            if step == 4:
                assert folder is None
                assert newest_step(run_dir) == 2 and not hidden(run_dir)
        return folder

    try:
        assert Together(2).run(work) == [run_dir / "checkpoints/step-00000006"] * 2
    finally:
        arm(False)
    alerts = [message for message in caplog.messages if "not written" in message]
    assert len(alerts) == 1 and os.strerror(number) in alerts[0] and "step 4" in alerts[0]


@pytest.mark.parametrize("num_saves", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_retention_keeps_every_needed_checkpoint(num_saves, tmp_path):
    found = retention(tmp_path, num_saves)
    assert (
        found["sound_after_each"] == found["saves"] == num_saves + 1
        and found["killed"]
        and found["refused"]
    ), found


@pytest.mark.parametrize("ema, slot", [(True, "ema"), (False, "raw")])
def test_all_ranks_start_from_the_same_init_weights(ema, slot, tmp_path, monkeypatch):
    """The newest checkpoint is damaged, and all ranks use the one before.

    Each of its files is hashed by one rank only.
    """
    monkeypatch.setitem(FACTS, "ema", ema)
    for step in (2, 4):
        save_all(tmp_path, step)
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "checkpoints/step-00000004/rank-00001-of-00002.safetensors").write_bytes(b"")
    hashed, real = [], checkpoint_reader.sha256

    def sha256(path, **kwargs):
        hashed.append(Path(path))
        return real(path, **kwargs)

    monkeypatch.setattr(checkpoint_reader, "sha256", sha256)
    config = parse("", overrides=[f"run.init={tmp_path}"])

    def start(rank):
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(torch.zeros(6000))
        return start_from(config, model, rank), model.w.detach()

    before = tmp_path / "checkpoints/step-00000002"
    for message, weights in Together(2).run(start):
        assert message == f"initialized with the {slot} weights of {before}"
        assert weights.equal(torch.arange(6000.0) / 2 if ema else torch.arange(6000.0) * 2)
    assert sorted(p.name for p in hashed if p.parent == before and p.name != "MANIFEST.json") == [
        p.name for p in sorted(before.glob("rank*"))
    ]


def test_pieces_are_read_for_any_number_of_ranks(tmp_path):
    """Whole tensors and the pieces of 1 to 5 ranks are read bit by bit.

    The written pieces start anywhere, or have equal sizes as in format 1.
    """
    whole = torch.randn(5993)
    padded = torch.nn.functional.pad(whole, (0, 1))
    begins = {"any": (0, 41, 5993), "padded": (0, 2997, 5994)}

    def work(rank):
        one = saver(tmp_path, rank)
        cut = {
            kind: padded[starts[rank.rank] : starts[rank.rank + 1]]
            for kind, starts in begins.items()
        }
        one.save(
            1,
            {
                "master/any": cut["any"],
                "start/any": torch.tensor(begins["any"][rank.rank]),
                "master/padded": cut["padded"],
                **({"ema/any": cut["any"]} if rank.first else {}),
            },
            {**FACTS, "shapes": {"any": [5993], "padded": [13, 461]}},
        )
        return one.wait()

    reader = checkpoint_reader.Reader(Together(2).run(work)[0])
    assert torch.equal(reader.full("master", "any"), whole)
    assert torch.equal(reader.full("master", "padded"), whole.view(13, 461))
    for name in begins:
        for size in range(1, 6):
            ends = [len(whole) * r // size for r in range(size + 1)]
            found = [
                reader.piece("master", name, at, to - at, first=r % 2)
                for r, (at, to) in enumerate(itertools.pairwise(ends))
            ]
            assert torch.equal(torch.cat(found), whole)
    with pytest.raises(InputError, match="has only 41 of 5993 values of ema/any"):
        reader.full("ema", "any")


def test_previous_format_is_read_and_a_newer_one_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "FORMAT", 1)
    assert checkpoint_reader.read_manifest(save_all(tmp_path, 3)[0])["format"] == 1
    monkeypatch.setattr(checkpoint_writer, "FORMAT", 3)
    with pytest.raises(InputError, match=r"no intact MANIFEST\.json"):
        checkpoint_reader.read_manifest(save_all(tmp_path, 4)[0])


def test_run_directory_admits_one_job(tmp_path):
    checkpoint_writer.lock_run_dir(tmp_path)
    pid = os.fork()
    if pid == 0:
        try:
            checkpoint_writer.lock_run_dir(tmp_path, timeout_s=0.2)
        except InputError as error:
            os._exit(5 if "is in use by process" in str(error) else 6)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


@pytest.mark.parametrize("num_gpus", [8, 64, 256])
@pytest.mark.parametrize("stall_s, write_s", [(0.05, 5.0), (0.5, 30.0), (0.5, 60.0)])
def test_planned_intervals_bound_the_loss_of_a_fault(num_gpus, stall_s, write_s):
    found = plan(num_gpus=num_gpus, stall_s=stall_s, write_s=write_s, mtbf_gpu_hours=20_000)
    assert (
        found.lost_gpu_hours <= 10 + 1e-9
        and found.stall <= 0.01 + 1e-9
        and found.interval_s >= write_s
    )
    assert found.lost_gpu_hours == pytest.approx((found.interval_s + write_s) * num_gpus / 3600)


@pytest.mark.parametrize(
    "num_kills",
    [10, pytest.param(200, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.slow)],
)
def test_no_commit_is_lost_to_a_kill(num_kills, tmp_path):
    """Two chains run at once, because each mostly waits for the watchdog."""
    with ThreadPoolExecutor() as pool:
        for found in pool.map(
            lambda seed: kill_chain(tmp_path / str(seed), num_kills // 2, seed), range(2)
        ):
            assert (
                found["commits_lost"] == 0
                and found["final_state_and_log_equal_to_a_run_without_kills"]
            ), found


@pytest.mark.parametrize("num_trials", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_resume_after_kill_is_bitwise(num_trials, tmp_path):
    assert bitwise_resumes(tmp_path, num_trials)["bitwise"] == num_trials


@pytest.mark.parametrize("ranks", [[0, 1], [1]])
def test_failed_evaluation_loses_no_step(ranks, tmp_path):
    """The step is saved before its evaluation, and the save completes when ranks fail."""
    settings = ["train.steps=8", "checkpoint.every_steps=4"]
    failing = {"width": 1_000_000, "evaluate_at": 4, "evaluate_s": 0.1}
    assert Job(tmp_path / "golden", *settings, **failing).wait(60) == [0, 0]
    for codes in ([1, 1] if len(ranks) == 2 else [DEAD, 1], [0, 0]):
        assert Job(tmp_path / "run", *settings, **failing, evaluate_fails=ranks).wait(60) == codes
    output = (tmp_path / "run/out-rank0.txt").read_text()
    assert "checkpoint of step 4 committed" in output and "resumed from step 4" in output
    assert final_files(tmp_path / "run") == final_files(tmp_path / "golden")
    assert log_rows(tmp_path / "run") == log_rows(tmp_path / "golden")


def test_resume_requires_the_same_data(tmp_path):
    """A checkpoint without data facts, as older versions wrote, resumes with any data."""
    for steps, data, message in (
        (2, None, "committed"),
        (4, {"images": [72, 5]}, "resumed from step 2"),
        (6, {"images": [72, 5]}, "resumed from step 4"),
        (8, {"images": [96, 7]}, "different data (72 images before, 96 images now)"),
        (
            8,
            {"images": [72, 7], "pairs": [9, 1]},
            "different data (72 images before, 72 other images now; 0 pairs before, 9 pairs now)",
        ),
    ):
        refused = "different data" in message
        job = Job(tmp_path, f"train.steps={steps}", "checkpoint.every_steps=2", data=data)
        assert job.wait(60) == [2 * refused] * 2, message
        assert message in (tmp_path / "out-rank0.txt").read_text(), message


def test_data_facts_depend_on_what_decides_the_order(tmp_path):
    for name, number, size in (("a", 8, 4), ("b", 8, 4), ("more", 9, 4), ("divided", 8, 8)):
        write_dataset(tmp_path / name, num_images=number, size_px=32, seed=1, shard_size=size)
    a, b, more, divided = (
        Shards(build(tmp_path / name, tmp_path / f"{name}-index", progress=False))
        for name in ("a", "b", "more", "divided")
    )
    assert data_facts(a) == data_facts(b) == json.loads(json.dumps(data_facts(a)))
    assert data_facts(a)["images"][0] == 8
    assert len({data_facts(shards)["images"][1] for shards in (a, more, divided)}) == 3
    assert data_facts(Joined(None, a)) == {"pairs": data_facts(a)["images"]}
    assert set(data_facts(Joined(a, more))) == {"images", "pairs"}
    # A shard without a good sample also affects the order of the others.
    divided.shard_sizes = [8, 0]
    assert (
        data_facts(divided)["images"][1]
        != data_facts(Shards(tmp_path / "divided-index"))["images"][1]
    )


def test_resume_with_another_world_size(tmp_path):
    for path, found in world_sizes(tmp_path).items():
        assert (
            found["samples_in_order"]
            and found["first_loss_bitwise"]
            and found["worst_relative"] <= 1e-6
        ), (path, found)
        assert found["loads"] == found["bitwise_loads"] == path.count("->"), (path, found)
        assert found["bitwise_to_the_end"] or "4" in path, (path, found)


@pytest.mark.slow
def test_resume_with_another_world_size_under_zero_3(tmp_path):
    for path, found in real_world_sizes(tmp_path).items():
        assert (
            found["samples_in_order"]
            and found["first_loss_bitwise"]
            and found["worst_relative"] <= 1e-6
        ), (path, found)
        assert found["loads"] == found["bitwise_loads"] == path.count("->"), (path, found)


def test_manifest_is_plain_json(tmp_path):
    folder = save_all(tmp_path, 3)[0]
    whole = json.loads((Path(folder) / "MANIFEST.json").read_text())
    assert whole["manifest"]["step"] == 3 and set(whole["manifest"]["files"]) == {
        f"rank-{r:05d}-of-00002.safetensors" for r in range(2)
    }
