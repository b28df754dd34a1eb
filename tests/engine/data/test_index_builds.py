"""Builds of the index.

Resume after a kill, concurrent builds, crashing and hanging decoders, headers only, padding, speed.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import corrupt_samples
import numpy as np
import pytest
from PIL import Image

from iomm.config import InputError
from iomm.engine import cli
from iomm.engine.data import workers
from iomm.engine.data.buckets import BucketSampler, bucket_sizes
from iomm.engine.data.index import build, ensure_index, load, summary
from iomm.engine.data.samplers import EpochPermutation
from iomm.engine.data.shards import Shards
from iomm.engine.data.sizes import upscaled_squares
from iomm.engine.data.source import ImageSource
from iomm.engine.data.validate import RECORD, Rules
from iomm.engine.shapes.dataset import write_dataset

ROOT = Path(__file__).resolve().parents[3]


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder / "tars", num_images=120, size_px=48, shard_size=20)
    return folder / "tars"


@pytest.fixture(scope="module")
def golden(dataset, tmp_path_factory):
    return files_of(build(dataset, tmp_path_factory.mktemp("golden") / "index", progress=False))


def test_killed_build_resumes_with_the_same_index(dataset, golden, tmp_path):
    """After a SIGKILL at each shard, a build reads only the missing shards.

    The index is the same as that of an undisturbed build.
    """
    code = (
        "import time\n"
        "from iomm.engine.data import index\n"
        "real = index._write_part\n"
        "def slow(*args):\n"
        "    real(*args)\n"
        "    print('part', flush=True)\n"
        "    time.sleep(0.5)\n"
        "index._write_part = slow\n"
        f"index.build({str(dataset)!r}, {str(tmp_path / 'index')!r}, progress=False, workers=1)"
    )
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "part\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not (tmp_path / "index").exists()
    parts = list((tmp_path / ".index.parts").glob("*.part"))
    assert len(parts) >= 3
    parts[0].unlink()
    validated = []
    real = workers.validate_shards

    def recorded(paths, *rest):
        validated.extend(paths)
        return real(paths, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iomm.engine.data.index.validate_shards", recorded)
        folder = build(dataset, tmp_path / "index", progress=False)
    assert len(validated) == 6 - len(parts) + 1 and files_of(folder) == golden
    assert os.listdir(tmp_path) == ["index"]


def test_index_is_the_same_for_any_number_of_workers(tmp_path, monkeypatch):
    """All workers share one shard in which some samples are bad."""
    jpegs = [
        corrupt_samples.encode(corrupt_samples.smooth_image(40, 40, seed), quality=50)
        for seed in range(4)
    ]
    (tmp_path / "a.tar").write_bytes(
        corrupt_samples.tar_of(
            [
                ("alone.txt", b"x"),
                *(
                    (f"{i:04d}.jpg", jpegs[i % 4][:100] if i % 97 == 5 else jpegs[i % 4])
                    for i in range(900)
                ),
            ]
        )
    )
    found = [
        files_of(build(tmp_path / "a.tar", tmp_path / f"{num}", progress=False, workers=num))
        for num in (1, 2, 3, 5)
    ]
    assert (
        all(files == found[0] for files in found)
        and len(found[0]["rejected.jsonl"].splitlines()) == 11
    )


def test_concurrent_builds_make_one_index(dataset, golden, tmp_path):
    done = []
    threads = [
        threading.Thread(
            target=lambda: done.append(ensure_index(dataset, tmp_path, progress=False))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        done[0] == done[1]
        and files_of(done[0]) == golden
        and os.listdir(tmp_path) == [done[0].name]
    )


def test_index_folder_is_accepted_as_shards(dataset, tmp_path):
    folder = build(dataset, tmp_path / "index", progress=False)
    assert (
        ensure_index(folder, tmp_path / "cache", progress=False) == folder
        and not (tmp_path / "cache").exists()
    )


@pytest.fixture
def faulty_decoder(monkeypatch, tmp_path):
    """A decoder in the workers that crashes, hangs or fills its memory at marked images."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("""
import os, signal, sys, time
from iomm.engine.data import validate
real = validate.check_image
def faulty(data, **options):
    if data.endswith(b"CRASH"): os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(b"HANG"): time.sleep(1000)
    if data.endswith(b"GROW"): bytearray(3 << 30)
    return real(data, **options)
validate.check_image = faulty
""")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{ROOT}")
    monkeypatch.setattr(workers, "SAMPLE_LIMIT_S", 1.5)


def test_crashing_or_hanging_decoder_costs_one_sample(faulty_decoder, tmp_path):
    jpeg = corrupt_samples.encode(corrupt_samples.smooth_image(40, 40))
    ends = {3: b"CRASH", 4: b"CRASH", 11: b"HANG", 15: b"GROW", 19: b"CRASH"}
    (tmp_path / "a.tar").write_bytes(
        corrupt_samples.tar_of([(f"{i:02d}.jpg", jpeg + ends.get(i, b"")) for i in range(20)])
    )
    folder = build(tmp_path / "a.tar", tmp_path / "index", progress=False)
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [
        ("03", "crash"),
        ("04", "crash"),
        ("11", "timeout"),
        ("15", "crash"),
        ("19", "crash"),
    ]
    assert "signal 11" in lines[0]["detail"] and len(Shards(folder)) == 15


def test_fast_verification_reads_only_headers(tmp_path):
    """verify=fast reads sizes and no pixels.

    A sample that is damaged after its header is replaced during training.
    """
    jpeg = corrupt_samples.encode(corrupt_samples.smooth_image(700, 500), quality=100)
    long_header = corrupt_samples.encode(
        corrupt_samples.smooth_image(100, 80), icc_profile=os.urandom(300_000)
    )
    clear = corrupt_samples.encode(corrupt_samples.smooth_image(100, 80).convert("RGBA"), "PNG")
    assert len(jpeg) > 1 << 16
    members = [
        ("whole.jpg", jpeg),
        ("cut.jpg", jpeg[:-900]),
        ("profile.jpg", long_header),
        ("clear.png", clear),
        ("tiny.jpg", corrupt_samples.encode(corrupt_samples.smooth_image(8, 8))),
        ("html.jpg", b"<html>"),
        ("empty.jpg", b""),
        ("headless.jpg", jpeg[:200]),
    ]
    (tmp_path / "a.tar").write_bytes(corrupt_samples.tar_of(members))
    assert (
        cli.main(
            ["index", str(tmp_path / "a.tar"), "--out", str(tmp_path / "index"), "--verify", "fast"]
        )
        == 0
    )
    rejected = [
        json.loads(line)
        for line in (tmp_path / "index" / "rejected.jsonl").read_text().splitlines()
    ]
    assert {line["key"]: line["reason"] for line in rejected} == {
        "tiny": "too_small",
        "html": "not_image",
        "empty": "truncated",
        "headless": "truncated",
    }
    shards = Shards(tmp_path / "index")
    assert [shards.size(k) for k in range(4)] == [(700, 500), (700, 500), (100, 80), (100, 80)]
    batches = list(
        ImageSource(
            shards,
            seed=0,
            global_batch=4,
            micro_batch=4,
            rank=0,
            world_size=1,
            size_px=32,
            vit_px=16,
            device="cpu",
            num_steps=2,
        )
    )
    failures = [failure for batch in batches for failure in batch.failures]
    assert len(failures) == 2 and all(
        "cut.jpg: DALI cannot decode it" in failure.problem for failure in failures
    )


def test_padding_is_detected(tmp_path):
    """img2dataset's border mode pads to a white square.

    Pictures of things on a white background do not count as padded.
    """
    bordered = []
    for seed, size in enumerate([(256, 160), (150, 256), (256, 200)]):
        square = Image.new("RGB", (256, 256), "white")
        square.paste(
            corrupt_samples.smooth_image(*size, seed), tuple((256 - side) // 2 for side in size)
        )
        bordered.append(corrupt_samples.encode(square))
    thing = Image.new("RGB", (256, 256), "white")
    thing.paste(corrupt_samples.smooth_image(150, 120), (50, 60))
    others = [
        corrupt_samples.encode(corrupt_samples.smooth_image(256, 256)),
        corrupt_samples.encode(thing),
        corrupt_samples.encode(Image.new("RGB", (256, 256), "white")),
        corrupt_samples.encode(corrupt_samples.smooth_image(256, 160)),
    ]
    (tmp_path / "a.tar").write_bytes(
        corrupt_samples.tar_of([(f"{i}.jpg", data) for i, data in enumerate(bordered + others)])
    )
    folder = build(tmp_path / "a.tar", tmp_path / "index", progress=False)
    assert load(folder).notes["padded"] == 3 and load(folder).notes["constant"] == 1
    assert (
        "warning: 3 of 7 images are padded to a square with white, "
        "as img2dataset's resize_mode=border"
    ) in summary(folder)


def test_wrong_rules_raise_input_error():
    for options, message in [
        ({"verify": "no"}, "verify must be one of full, fast"),
        ({"min_size_px": 0}, "must be >= 1, got 0"),
        ({"captions": "no"}, "captions must be one of"),
    ]:
        with pytest.raises(InputError, match=message):
            Rules(**options)


def test_samples_occur_once_per_epoch_despite_kills(tmp_path):
    """After 10 kills at random steps, and a change of ranks, no sample is missing or repeated.

    The sequence is that of an undisturbed run. The dataset has 40 shards of 250 samples, and 3 % of
    them are bad.
    """
    jpegs = [
        corrupt_samples.encode(corrupt_samples.smooth_image(40, 40, seed), quality=50)
        for seed in range(8)
    ]
    random = np.random.default_rng(0)
    bad = set(random.choice(10_000, 300, replace=False).tolist())
    (tmp_path / "tars").mkdir()
    for shard in range(40):
        numbers = range(250 * shard, 250 * shard + 250)
        (tmp_path / "tars" / f"{shard:02d}.tar").write_bytes(
            corrupt_samples.tar_of(
                [
                    (f"{i:05d}.jpg", jpegs[i % 8][:200] if i in bad else jpegs[i % 8])
                    for i in numbers
                ]
            )
        )
    folder = build(tmp_path / "tars", tmp_path / "index", progress=False, workers=2)
    shards = Shards(folder)
    rejected = {
        int(json.loads(line)["key"])
        for line in (folder / "rejected.jsonl").read_text().splitlines()
    }
    assert rejected == bad and len(shards) == 9700
    numbers = {k: int(shards.name(k).rpartition(": ")[2][:5]) for k in range(9700)}

    def steps(first, last, world_size):
        """Yield the entries of each step, rank by rank, in the order in which they are decoded."""
        sources = [
            ImageSource(
                shards,
                seed=9,
                global_batch=100,
                micro_batch=25,
                rank=rank,
                world_size=world_size,
                size_px=32,
                vit_px=16,
                device="cpu",
                start_step=first,
                num_steps=last,
            )
            for rank in range(world_size)
        ]
        for step in range(first, last):
            yield [
                int(k)
                for a in range(sources[0].accumulation_steps)
                for source in sources
                for k in source.sampler(source.positions(step, a))
            ]

    golden = list(steps(0, 97, 4))
    at = 0
    world_size = 4
    run = []
    for kill in sorted(random.integers(1, 97, 10).tolist()):
        run = run[:at] + list(steps(at, kill, world_size))
        # Resume from the last checkpoint, later on half the ranks.
        at = max(at, kill - int(random.integers(0, 3)))
        world_size = 2 if kill > 40 else 4
    run = run[:at] + list(steps(at, 97, 1))
    assert run == golden
    seen = Counter(numbers[k] for step in run for k in step)
    assert set(seen) == set(range(10_000)) - bad and set(seen.values()) == {1}


@pytest.fixture(scope="module")
def ten_million(tmp_path_factory):
    """An index of 10 M samples in 1,000 shards. All shards are links to one small tar."""
    folder = tmp_path_factory.mktemp("many")
    (tar,) = write_dataset(folder / "tars", num_images=64, size_px=48, shard_size=64)
    small = build(tar, folder / "small", progress=False)
    header = json.loads((small / "index.json").read_text())
    records = np.fromfile(small / "index.bin", RECORD)
    (folder / "index").mkdir()
    for shard in range(1000):
        (folder / f"{shard:04d}.tar").symlink_to(tar)
    header["shards"] = [
        header["shards"][0] | {"path": str(folder / f"{shard:04d}.tar"), "num_samples": 10_000}
        for shard in range(1000)
    ]
    header["num_samples"] = 10_000_000
    (folder / "index" / "index.json").write_text(json.dumps(header))
    block = records[np.arange(10_000) % 64]
    with open(folder / "index" / "index.bin", "wb") as f:
        for _ in range(1000):
            f.write(block.tobytes())
    return folder / "index"


def test_ten_million_samples_fit_400_mb_and_start_in_two_seconds(ten_million):
    assert (ten_million / "index.bin").stat().st_size + (
        ten_million / "index.json"
    ).stat().st_size <= 400e6
    started = time.process_time()
    shards = Shards(ten_million)
    loaded_s = time.process_time() - started
    batches = iter(
        ImageSource(
            shards,
            seed=0,
            global_batch=32,
            micro_batch=32,
            rank=0,
            world_size=1,
            size_px=32,
            vit_px=16,
            device="cpu",
            num_steps=100_000,
            start_step=99_000,
        )
    )
    assert len(next(batches).n_B) == 32
    first_s = time.process_time() - started
    batches.close()
    assert loaded_s < 1 and first_s < 2
    started = time.process_time()
    sampler = BucketSampler(0, shards.index, 1024, bucket_sizes(512, 16))
    sampler(np.arange(10**9, 10**9 + 1024))
    print(
        f"10 M samples: index {loaded_s:.2f} s, first batch {first_s:.2f} s, "
        f"buckets {time.process_time() - started:.2f} s"
    )
    assert time.process_time() - started < 5
    started = time.process_time()
    # All pictures have 48 px.
    counts = [upscaled_squares(shards.index.records, size_px).num for size_px in (48, 49)]
    assert [*counts, sampler.upscaled(512).num] == [0, 10_000_000, 10_000_000]
    print(f"images to upscale, three times: {time.process_time() - started:.2f} s")
    assert EpochPermutation(0, shards.shard_sizes).total == 10_000_000


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Return the current folder, with files that would hide modules that a worker imports."""
    for name in ("random.py", "numpy.py", "struct.py", "PIL/__init__.py", "iomm/__init__.py"):
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise ImportError('{name} of the current folder was run')\n")
    monkeypatch.chdir(tmp_path / "here")
    # Empty entries are the current folder.
    monkeypatch.setenv("PYTHONPATH", f":{os.environ.get('PYTHONPATH', '')}:")
    return tmp_path / "here"


def test_workers_import_nothing_from_the_current_folder(own_modules, tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(3):
        Image.effect_noise((48, 48), 90 + n).convert("RGB").save(tmp_path / f"photos/{n}.jpg")
    folder = build(str(tmp_path / "photos"), tmp_path / "index", progress=False, workers=1)
    assert len(load(folder).records) == 3


def test_reason_of_a_worker_that_does_not_start_is_reported(own_modules, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(own_modules))
    (tmp_path / "photos").mkdir()
    Image.effect_noise((48, 48), 90).convert("RGB").save(tmp_path / "photos/0.jpg")
    with pytest.raises(InputError, match=r"exit code 1: ImportError: .* current folder was run"):
        build(str(tmp_path / "photos"), tmp_path / "index", progress=False, workers=1)
