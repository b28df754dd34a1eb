"""A caption that is too long is cut, counted and named, and never ends a run."""

import json

import corrupt_samples
import huggingface_hub
import pytest
import torch
from launches import PIXELS, launch, rows

from iomm.caption_limit import CaptionLimit
from iomm.config import AdapterConfig, InputError, PromptConfig
from iomm.engine import builders, cli, dry_run
from iomm.engine.config import load_config
from iomm.engine.data import bad_samples as counted
from iomm.engine.data import sizes
from iomm.engine.data.bad_samples import BadSamples, Failure
from iomm.engine.data.index import build
from iomm.engine.data.mixture import Joined
from iomm.engine.data.samplers import SequentialSampler
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.engine.data.validate import Rules

LONG = "一幅画" * 130
NUM, FIRST_LONG = 8, 5


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    """A tar of 8 pairs. The captions of the sixth and the last, in a JSON, are too long."""
    image = corrupt_samples.encode(corrupt_samples.smooth_image(40, 40, 0))
    members = []
    for i in range(NUM - 1):
        text = LONG if i == FIRST_LONG else "a picture"
        members += [(f"{i}.jpg", image), (f"{i}.txt", text.encode())]
    members += [("7.jpg", image), ("7.json", json.dumps({"caption": LONG}).encode())]
    path = tmp_path_factory.mktemp("pairs") / "pairs.tar"
    path.write_bytes(corrupt_samples.tar_of(members))
    return path


@pytest.fixture(scope="module")
def index_dir(tar):
    return build(
        tar, tar.parent / "index", rules=Rules(captions="required"), progress=False, workers=1
    )


@pytest.fixture(scope="module")
def limit(mllm):
    return CaptionLimit(mllm, AdapterConfig(num_queries=8, head_dim=16), PromptConfig())


def batches(index_dir, limit, rank=0, size=1, start_step=0):
    shards = Joined(None, Shards(index_dir))
    source = ImageSource(
        shards,
        seed=0,
        global_batch=4,
        micro_batch=4 // size,
        rank=rank,
        world_size=size,
        size_px=16,
        vit_px=16,
        device=torch.device("cpu"),
        num_steps=4,
        start_step=start_step,
        sampler=SequentialSampler([*range(NUM)] * 2, 16, pairs=True),
        caption_limit=limit,
    )
    return list(source)


def found(batches):
    """Return ({n: caption}, failures in order)."""
    captions = {
        n: caption
        for batch in batches
        for n, caption in zip(batch.n_B.tolist(), batch.captions, strict=True)
    }
    return captions, sorted((f for batch in batches for f in batch.failures), key=lambda f: f.n)


def test_long_captions_are_cut_and_named_whatever_the_ranks(index_dir, limit):
    captions, failures = found(batches(index_dir, limit))
    assert [captions[n] for n in range(5)] == ["a picture"] * 5
    assert captions[5] == captions[7] == captions[13] == limit.cut(LONG)
    assert [failure.n for failure in failures] == [5, 7, 13, 15]
    assert all(failure.cut and not failure.fatal for failure in failures)
    assert "pairs.tar: 5.jpg: its caption of 1,170 tokens was cut to the" in failures[0].problem
    two = found(batches(index_dir, limit, 0, 2) + batches(index_dir, limit, 1, 2))
    assert two == (captions, failures)
    resumed, later = found(batches(index_dir, limit, start_step=2))
    assert later == failures[2:] and resumed == {n: captions[n] for n in range(8, 16)}


def test_cut_captions_are_counted_apart_from_replaced_samples(tmp_path):
    counter = BadSamples(0.0, 0, tmp_path / "skipped.jsonl")
    for step in range(3):
        cuts = [Failure(2 * step + i, 3 * step + i, "was cut", cut=True) for i in range(2)]
        counter.record(cuts, 2 * step + 2)
    assert counter.total == 0 and counter.cut_captions == 6 and not counter.shards
    restored = BadSamples(0.0, 0)
    restored.restore(json.loads(json.dumps(counter.state())))
    assert restored.cut_captions == 6
    # A checkpoint of an earlier version.
    restored.restore({"total": 1, "shards": [4]})
    assert restored.cut_captions == 0 and restored.total == 1
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == [*range(6)] and all(line["cut"] for line in lines)


def test_only_some_of_many_cut_captions_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(counted, "MAX_NAMED_CUTS", 3)
    counter = BadSamples(1.0, 5, tmp_path / "skipped.jsonl")
    for step in range(3):
        gone = Failure(2 * step, 0, "is gone")
        counter.record([Failure(2 * step + 1, 0, "was cut", cut=True)] * 2 + [gone], 2 * step + 2)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert counter.cut_captions == 6 and sum(line["cut"] for line in lines) == 3
    assert [line["n"] for line in lines if not line["cut"]] == [0, 2, 4]


def test_resume_removes_the_lines_of_samples_that_are_read_again(tmp_path):
    counter = BadSamples(1.0, 5, tmp_path / "skipped.jsonl")
    counter.restore({"total": 0, "shards": []}, 8)
    assert not list(tmp_path.iterdir())
    counter.record([Failure(n, 0, "was cut", cut=True) for n in range(4)], 4)
    state = counter.state()
    counter.record([Failure(n, 0, "was cut", cut=True) for n in (4, 5)], 8)
    with open(tmp_path / "skipped.jsonl", "a") as file:
        # A kill has cut the last line.
        file.write('{"n": 6, "sha')
    resumed = BadSamples(1.0, 5, tmp_path / "skipped.jsonl")
    resumed.restore(state, 4)
    resumed.record([Failure(n, 0, "was cut", cut=True) for n in (4, 5, 6)], 8)
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [*range(7)]
    assert resumed.cut_captions == 7


# Launches one and two ranks.
@pytest.mark.slow
def test_cut_captions_are_the_same_on_two_ranks_and_after_resume(tar, tmp_path):
    settings = [
        "--config",
        PIXELS,
        f"data.pairs={tar}",
        "data.size_px=32",
        "train.data=pair",
        "train.global_batch=4",
        "train.threads=1",
        "checkpoint.every_steps=2",
        "log.sample_images=0",
    ]
    for size, name, steps in ((1, "whole", 6), (2, "parts", 3), (1, "parts", 6)):
        resume = ["--resume", "auto", f"run.dir={tmp_path}/{name}", f"train.steps={steps}"]
        done = launch(size, *settings, *resume)
        assert done.returncode == 0, done.stdout
        assert "warning: 2 of 8 captions are longer than the" in done.stdout
    counts = {
        name: [row["cut_captions"] for row in rows(tmp_path / name / "log.jsonl")]
        for name in ("whole", "parts")
    }
    # Two epochs of three are complete, and the last one began.
    assert counts["whole"] == counts["parts"] and counts["whole"][3] == 4
    named = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("whole", "parts")]
    assert named[0] == named[1] and len(named[0].splitlines()) == counts["whole"][-1]


def test_index_and_dry_run_warn_of_long_captions(tar, tmp_path, capsys):
    words = "warning: 2 of 8 captions are longer than the 4"
    command = ["index", str(tar), "--out", str(tmp_path / "index")]
    assert cli.main([*command, "--captions", "required"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(words) and last.endswith("pairs.tar: 5.jpg")
    # The caption of an image that needs none is not read.
    assert cli.main(command) == 0
    assert "captions are longer" not in capsys.readouterr().out
    config = load_config(
        PIXELS,
        [
            f"run.dir={tmp_path}/run",
            f"data.pairs={tar}",
            "data.size_px=32",
            "train.data=pair",
            "train.global_batch=4",
            "train.micro_batch=4",
            "train.compile=false",
        ],
    )
    assert dry_run.make_plan(config, ranks=1).captions == []
    builders.prepare_data(config, progress=False, pairs=True)
    plan = dry_run.make_plan(config, ranks=1)
    assert plan.captions[0].startswith(words)
    assert dry_run.describe(plan, config).splitlines()[-1] == plan.captions[0]


def test_prompts_of_the_config_are_checked_at_the_start(mllm):
    """With several prompts to draw from, the long one could end the run at any step."""
    for key, others in (("reconstruct", "Generate | "), ("empty", "")):
        config = load_config(PIXELS, [f"prompt.{key}={others}{'word ' * 200}"])
        with pytest.raises(
            InputError, match=rf"prompt\.{key} has a prompt of (999|1,000) tokens, but "
        ):
            builders.check_prompts(config, mllm)
    builders.check_prompts(load_config(PIXELS), mllm)
    # A run on pairs does not read the prompts of images.
    pairs = ["train.data=pair", "data.pairs=x", f"prompt.reconstruct={'word ' * 200}"]
    builders.check_prompts(load_config(PIXELS, pairs), mllm)


def test_many_long_captions_are_estimated(index_dir, limit, monkeypatch):
    exact = sizes.count_long(Shards(index_dir), limit)
    assert (exact.num, exact.total, exact.estimated) == (2, 8, False)
    monkeypatch.setattr(sizes, "MAX_TOKENIZED", 1)
    some = sizes.count_long(Shards(index_dir), limit)
    assert (some.num, some.total, some.estimated) == (2, 8, True)
    assert some.sentence("shapes").startswith("about 2 of 8 captions are longer than the ")


def test_unreachable_tokenizer_does_not_fail_the_count(index_dir, monkeypatch):
    config = load_config(PIXELS, ["model.mllm=unknown/nothing"])
    # The environment variable is read at import. Without it the hub is tried for 20 s.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (line,) = builders.long_captions(config, index_dir)
    assert line.startswith("captions that exceed the MLLM's context were not counted: model.mllm")
