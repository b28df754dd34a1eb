"""RunConfig: strict types, errors with file and line, a round trip through YAML."""

import re
import time

import pytest

from iomm.config import InputError
from iomm.engine.config import CONFIGS, RunConfig, all_keys, differences, flat, load_config, parse
from iomm.engine.data.patterns import expand


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_load_and_round_trip(path):
    config = load_config(path.stem)
    assert parse(config.to_yaml()) == config


def test_overrides_win_over_the_file():
    config = parse(
        "optim:\n  lr: 1e-4\n  betas: [0.9, 0.95]\n",
        overrides=["optim.lr=2e-3", "train.micro_batch=null"],
    )
    assert (
        config.optim.lr == 2e-3
        and config.optim.betas == (0.9, 0.95)
        and config.train.micro_batch is None
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("run:\n  seed: 010\n", "f.yaml:2: run.seed must be a whole number, got '010'"),
        ("run:\n  seed: 1.5\n", "f.yaml:2: run.seed must be a whole number"),
        ("run:\n  seed: -1\n", "f.yaml:2: run.seed must be >= 0"),
        ("optim:\n  lr: '1e-4'\n", "f.yaml:2: optim.lr must be a number, got the quoted text"),
        ("optim:\n  lr: fast\n", "f.yaml:2: optim.lr must be a number, got 'fast'"),
        ("optim:\n  lr: .nan\n", "f.yaml:2: optim.lr must be a number"),
        ("optim:\n  lr: 0\n", "f.yaml:2: optim.lr must be > 0"),
        (
            f"run:\n  seed: {2**64}\n",
            f"f.yaml:2: run.seed must be >= 0 and below 2^64, got {2**64}",
        ),
        ("optim:\n  weight_decay: -1\n", "f.yaml:2: optim.weight_decay must be >= 0, got -1.0"),
        ("optim:\n  eps: 0\n", "f.yaml:2: optim.eps must be > 0, got 0.0"),
        ("adapter:\n  head_dim: 0\n", "f.yaml:2: adapter.head_dim must be >= 1, got 0"),
        ("evaluate:\n  guidance: -1\n", "f.yaml:2: evaluate.guidance must be >= 0, got -1.0"),
        (
            "data:\n  latents: x\ntrain:\n  data: pair\n",
            "a folder in data.latents holds images only, but train.data is pair: set "
            "train.data=image or data.latents=memory, or",
        ),
        ("optim:\n  betas: [0.9]\n", "f.yaml:2: optim.betas must be 2 numbers"),
        ("optim:\n  lr: [1]\n", "f.yaml:2: optim.lr must be a number, got a list"),
        ("optim:\n  lr: {a: 1}\n", "f.yaml:2: optim.lr must be a number, got a section"),
        ("optm:\n  lr: 1\n", "f.yaml:1: unknown key optm; did you mean optim"),
        ("train:\n  step: 3\n", "f.yaml:2: unknown key train.step; did you mean train.steps?"),
        ("train: 3\n", "f.yaml:1: train must be a section"),
        ("- 1\n", "f.yaml:1: the file must be a section"),
        ("data:\n  flip: NO\n", "f.yaml:2: data.flip must be true or false, got 'NO'"),
        ("run:\n  seed: 1\n  seed: 2\n", "f.yaml:3: run.seed is given twice"),
        ("run: &a\n  seed: 1\nmask: *a\n", "aliases"),
        ("run:\n  seed: [1\n", "f.yaml:3: not valid YAML"),
        (
            "precision: fp16\n",
            "f.yaml:1: precision must be one of auto, bf16, fp32, fp8; got 'fp16'",
        ),
        ("mask:\n  ratio: 1.5\n", "f.yaml:2: mask.ratio must be between 0 and 1"),
        ("ema:\n  decay: 1\n", "f.yaml:2: ema.decay must be in"),
        ("model:\n  preset: iomm-z\n", "f.yaml:2: model.preset must be one of"),
        ("!!python/object/apply:os.system ['true']\n", "f.yaml:1: the file must be a section"),
        (
            "run:\n  dir: !!python/object/apply:os.system ['true']\n",
            "f.yaml:2: run.dir must be text, got a list",
        ),
        ("run:\n  seed: 1\nrun:\n  seed: 2\n", "f.yaml:4: run.seed is given twice"),
        ("train:\n  steps: 1_000\n", "f.yaml:2: train.steps must be a whole number, got '1_000'"),
        (
            "train:\n  global_batch: 1e3\n",
            "f.yaml:2: train.global_batch must be a whole number, got '1e3'",
        ),
        ("train:\n  timeout_s: 30min\n", "f.yaml:2: train.timeout_s must be a number, got '30min'"),
        ("train:\n  steps: 0x10\n", "f.yaml:2: train.steps must be a whole number, got '0x10'"),
        (
            "ema:\n  decay: '0.99'\n",
            "f.yaml:2: ema.decay must be a number, got the quoted text '0.99'",
        ),
        ("data:\n  size_px: 512px\n", "f.yaml:2: data.size_px must be a whole number, got '512px'"),
        (
            "guard:\n  max_skips: 2.5\n",
            "f.yaml:2: guard.max_skips must be a whole number, got '2.5'",
        ),
        ("optim:\n  lr: null\n", "f.yaml:2: optim.lr must be a number, got 'null'"),
        ("optim:\n  lr: .inf\n", "f.yaml:2: optim.lr must be a number, got '.inf'"),
        ("guard:\n  hang_s: -1\n", "f.yaml:2: guard.hang_s must be >= 0"),
        (
            "guard:\n  hang_m: 10\n",
            "f.yaml:2: unknown key guard.hang_m; did you mean guard.hang_s?",
        ),
        (
            "guard:\n  skip_spikes: 1\n",
            "f.yaml:2: guard.skip_spikes must be true or false, got '1'",
        ),
        (
            "train:\n  micro_batch: most\n",
            "f.yaml:2: train.micro_batch must be a number, auto or null, got 'most'",
        ),
        (
            "train:\n  micro_batch: 1.5\n",
            "f.yaml:2: train.micro_batch must be a number, auto or null, got '1.5'",
        ),
        ("train:\n  micro_batch: 0\n", "f.yaml:2: train.micro_batch must be >= 1, got 0"),
        ("checkpoint:\n  keep: 1\n", "f.yaml:2: checkpoint.keep must be >= 2, got 1"),
        ("checkpoint:\n  every_steps: 0\n", "f.yaml:2: checkpoint.every_steps must be >= 1"),
        (
            "checkpoint:\n  background: yes\n",
            "f.yaml:2: checkpoint.background must be true or false, got 'yes'",
        ),
        (
            "checkpoint:\n  every: 10\n",
            "f.yaml:2: unknown key checkpoint.every; did you mean checkpoint.every_steps?",
        ),
        ("run:\n\tseed: 1\n", "f.yaml:2: not valid YAML"),
        (
            "a: &a [1]\n"
            + "".join(
                f"k{i}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
            ),
            "f.yaml:2: YAML aliases",
        ),
        ("run: " + "[" * 100_000, "f.yaml:1: nested more than 10 levels deep"),
    ],
)
def test_errors_name_file_line_and_key(text, message):
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        parse(text, "f.yaml")
    assert (
        message in str(error.value)
        and "\n" not in str(error.value)
        and re.match(r"f\.yaml:\d+: ", str(error.value))
    )
    assert time.monotonic() - started < 2


def test_prompts_are_a_text_or_a_list():
    one = parse("prompt:\n  reconstruct: 'The same as: it'\n").prompt
    assert one.reconstruct == ("The same as: it",)
    several = parse("prompt:\n  reconstruct: ['a, b', c]\n")
    assert several.prompt.reconstruct == ("a, b", "c")
    assert parse("", overrides=["prompt.reconstruct=a, b | c"]).prompt == several.prompt
    # A saved config is read back.
    assert parse(several.to_yaml()) == several
    with pytest.raises(InputError, match=r"f\.yaml:2: prompt\.caption must contain \{caption\}"):
        parse("prompt:\n  caption: Generate\n", "f.yaml")


@pytest.mark.parametrize(
    "override, message",
    [
        ("trian.steps=5", "unknown key trian.steps; did you mean train.steps?"),
        ("train=5", "train is a section; set one of its keys: train."),
        ("train.steps", "must look like section.key=value"),
        ("train.steps=x", "train.steps must be a whole number, got 'x'"),
        ("train.steps=0", "command line: train.steps must be >= 1, got 0"),
    ],
)
def test_wrong_overrides_are_refused(override, message):
    with pytest.raises(InputError, match="(?s).*" + message.replace("?", r"\?")):
        parse("", overrides=[override])


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_bytes(b"run:\n  dir: \xff\xfe\n")
    with pytest.raises(InputError, match=r"f\.yaml:2: not UTF-8 text"):
        load_config(str(path))


def test_missing_config_lists_the_shipped_ones():
    with pytest.raises(InputError, match=r"Give a path ending in \.yaml or one of: .*demo"):
        load_config("dmeo")


def test_differences_ignore_free_keys():
    config = RunConfig()
    # The last two only change rounding.
    free = ["train.steps=7", "run.dir=x", "train.recompute=3", "train.compile=true"]
    assert differences(parse("", overrides=free), config) == []
    assert differences(parse("", overrides=["optim.lr=0.5"]), config) == [
        "optim.lr: 0.0001 became 0.5"
    ]
    assert set(flat(config)) == set(all_keys(RunConfig))


def test_shards_may_be_a_list(tmp_path):
    text = 'data:\n  shards: ["/a, b/*.tar", /c.tar]\n  pairs:\n  - shapes\n'
    config = parse(text)
    assert config.data.shards == ("/a, b/*.tar", "/c.tar") and config.data.pairs == "shapes"
    assert parse(config.to_yaml()) == config and not differences(config, parse(config.to_yaml()))
    assert parse(text, "config", ["data.shards=/d.tar"]).data.shards == "/d.tar"
    assert parse("data: {pairs: null}").data.pairs is None
    # Names with commas of a list are not split where they exist.
    (tmp_path / "a, b").mkdir()
    names = [tmp_path / "a, b" / "0.tar", tmp_path / "1.tar"]
    for name in names:
        name.touch()
    listed = parse(f"data: {{shards: ['{tmp_path}/a, b/*.tar', '{tmp_path}/1.tar']}}")
    assert sorted(expand(listed.data.shards)) == sorted(names)
    for wrong in ("[a, ['b']]", "['']", "[]", "{a: b}"):
        with pytest.raises(InputError, match=r"data\.shards must be a (text or a )?list of texts"):
            parse(f"data: {{shards: {wrong}}}")
    with pytest.raises(InputError, match=r"data\.latents must be text or null, got a list"):
        parse("data: {latents: [a]}")
