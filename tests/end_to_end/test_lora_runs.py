"""A run with LoRA from the command line: dry run, training, resume, sampling, export, errors."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from launches import PIXELS, hashes, launch_and_kill, rows, start
from parity import randomize, relative_error
from PIL import Image
from safetensors import safe_open

from iomm import lora
from iomm.config import GeneratorConfig, InputError
from iomm.engine.builders import build_model, load_run
from iomm.engine.cli import main
from iomm.engine.config import load_config
from iomm.engine.dry_run import (
    build_without_weights,
    check_paths,
    describe,
    make_plan,
)
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.shapes.dataset import write_dataset
from iomm.pipeline import Pipeline
from iomm.weights import load_generator

SHAPE = GeneratorConfig(width=64, num_heads=2, num_blocks=2)
PIXEL_SPACE = ["--config", PIXELS, "model.preset=from-init", "precision=fp32", "optim.kind=adamw"]


def base_model(seed=0, **changes):
    """Return the pipeline of a random base."""
    config = load_config(PIXELS, ["model.preset=from-init", "precision=fp32"])
    shape = json.dumps(asdict(replace(SHAPE, **changes)))
    config = replace(config, model=replace(config.model, shape=shape))
    return Pipeline(randomize(build_model(config, "cpu"), seed), 16)


def save_base(folder, **changes):
    base_model(**changes).save_pretrained(folder, mllm="shapes", vae="pixel:2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a dataset, `shapes`, and an exported base, `base`."""
    folder = tmp_path_factory.mktemp("lora")
    write_dataset(folder / "shapes", num_images=24, size_px=32, seed=1)
    save_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    return [
        *PIXEL_SPACE,
        f"data.shards={folder / 'shapes'}",
        f"data.pairs={folder / 'shapes'}",
        f"run.init={folder / 'base'}",
        "train.data=mix",
        "train.global_batch=4",
        "train.threads=1",
        "optim.lr=0.05",
        "optim.warmup_steps=0",
        "ema.decay=0.5",
        "log.sample_images=0",
        "data.heldout=2",
        "evaluate.every_steps=2",
        "evaluate.num_images=1",
        "evaluate.steps=1",
        "lora.rank=4",
        "lora.dropout=0.1",
    ]


@pytest.fixture(scope="module")
def run_dir(folder, settings):
    """Return the folder of a run of two steps that was resumed for a third one."""
    run_dir = folder / "run"
    arguments = ["--stage", "finetune", *settings, f"run.dir={run_dir}"]
    done = start(1, *arguments, "train.steps=2")
    assert done.returncode == 0, done.stdout
    assert f"LoRA base: {folder / 'base'}" in done.stdout
    assert " M trained (LoRA) and " in done.stdout
    # Sharding may be switched on at a resume.
    more = "train.steps=3", "lora.shard_base=true", "--resume", "auto"
    done = start(1, *arguments, *more)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout
    assert "lora.shard_base changes nothing on a node with one rank" in done.stdout
    return run_dir


def test_run_trains_evaluates_and_resumes(run_dir):
    found = rows(run_dir / "log.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3]
    assert all(0 < row["heldout_loss"]["pair"]["mean"] < 10 for row in found[1:])
    newest = checkpoint_reader.newest(run_dir / "checkpoints")
    manifest = checkpoint_reader.read_manifest(newest)
    assert all(".lora." in name for name in manifest["shapes"]) and manifest["step"] == 3


def test_sample_and_exports_use_base_and_lora(run_dir, folder, tmp_path, capsys):
    """The merged export, loaded like any other, samples what the run samples."""
    from diffusers import FluxTransformer2DModel

    prompt = ["a red circle"]
    _, model, _ = load_run(run_dir)
    with torch.no_grad():
        for p in model.parameters():
            assert p.isfinite().all() and p.any()
    ours = Pipeline(model, 16)(prompt, steps=2)
    base = Pipeline.from_pretrained(folder / "base", device="cpu")(prompt, steps=2)
    assert np.abs(np.int16(ours[0]) - np.int16(base[0])).max() > 2
    assert main(["export", "--run", str(run_dir), "--merge"]) == 0
    merged = Pipeline.from_pretrained(run_dir / "export/ema-merged", device="cpu")
    # Levels of 0 to 255; rounding of the merged weights may move one.
    theirs = merged(prompt, steps=2)
    assert np.abs(np.int16(ours[0]) - np.int16(theirs[0])).max() <= 1
    FluxTransformer2DModel.from_pretrained(run_dir / "export/ema-merged")
    assert main(["export", "--run", str(run_dir)]) == 0
    path = run_dir / "export/ema/pytorch_lora_weights.safetensors"
    assert capsys.readouterr().out.split()[-1] == str(path)
    with safe_open(path, "pt") as file:
        origin = json.loads(file.metadata()["iomm"])
        assert origin["step"] == "3" and origin["base"] == "base"
        tensor = file.get_tensor("transformer.transformer_blocks.1.attn.to_k.lora_A.weight")
    A = model.generator.blocks[1].latent_stream.qkv.lora.A.weight
    assert torch.equal(tensor, A[4:8])
    out = tmp_path / "grid.png"
    assert main(["sample", "--run", str(run_dir), "--num=1", "--steps=1", f"--out={out}"]) == 0
    assert Image.open(out).size[0] >= 16


def test_base_that_changed_is_rejected(run_dir, folder, settings, tmp_path):
    """Also by a resume. The base's name stays the same."""
    kept = tmp_path / "kept"
    shutil.copytree(folder / "base", kept)
    try:
        save_base(folder / "base", seed=1)
        with pytest.raises(
            InputError, match=r"trained on another base .*\(checksum \w{16}, expected \w{16}\)"
        ):
            load_run(run_dir)
        arguments = ["--stage", "finetune", *settings, f"run.dir={run_dir}", "train.steps=4"]
        done = start(1, *arguments, "--resume", "auto")
        assert done.returncode == 2 and "was trained on another base" in done.stdout, done.stdout
    finally:
        shutil.rmtree(folder / "base")
        shutil.copytree(kept, folder / "base")


@pytest.mark.parametrize(
    "changes, message",
    [
        (["lora.rank=4"], "run.init does not name the base"),
        (["lora.rank=4", "run.init=x", "align.weight=0.5"], "align.weight trains an alignment"),
        (["lora.rank=-4"], "lora.rank must be >= 0"),
        (["lora.shard_base=true"], "shards the frozen base of LoRA, but lora.rank is 0"),
        (["lora.dropout=1"], r"lora.dropout must be in \[0, 1\), got 1"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        load_config(PIXELS, changes)


def test_incomplete_base_is_rejected(folder, tmp_path):
    """The adapter is missing, or the base reads another MLLM."""
    config = load_config(
        PIXELS, [*PIXEL_SPACE[2:], "model.preset=demo", "lora.rank=4", f"run.init={tmp_path}"]
    )
    shutil.copytree(folder / "base", tmp_path, dirs_exist_ok=True)
    shape = json.dumps(asdict(SHAPE))
    config = replace(config, model=replace(config.model, preset="from-init", shape=shape))
    build_model(config, "cpu")
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks weights of 1 parts, such as adapter .*missing"):
        build_model(config, "cpu")
    none = replace(config, adapter=replace(config.adapter, kind="none", conditions="all"))
    build_model(none, "cpu")
    larger = replace(config, model=replace(config.model, vae="pixel:4"))
    with pytest.raises(InputError, match=r"lacks weights of 4 parts, such as latents_in.weight"):
        build_model(larger, "cpu")


def test_run_with_lora_cannot_be_a_base(run_dir, settings):
    config = load_config(PIXELS, [s for s in settings if "=" in s])
    shape = load_config(str(run_dir / "config.yaml")).model.shape
    config = replace(
        config,
        model=replace(config.model, shape=shape),
        run=replace(config.run, init=str(run_dir)),
    )
    with pytest.raises(InputError, match=r"itself a run with LoRA .* --merge"):
        build_model(config, "cpu")


def test_dry_run_counts_lora_apart_from_its_base(folder, settings):
    config = load_config(PIXELS, [s for s in settings if "=" in s])
    config = replace(config, model=replace(config.model, shape=json.dumps(asdict(SHAPE))))
    model = build_without_weights(config)
    check_paths(config, model)
    counted = make_plan(config, ranks=2)
    trained = sum(p.numel() for p in model.parameters())
    full = make_plan(replace(config, lora=replace(config.lora, rank=0)), ranks=2)
    assert (
        counted.parameters["LoRA"]
        == trained
        == config.lora.rank
        * sum(
            linear.in_features * len(linear.lora.targets)
            + sum(linear.lora.rows[part] for part in linear.lora.targets)
            for linear in lora.layers_with_lora(model.generator).values()
        )
    )
    for part in ("generator", "adapter"):
        assert counted.parameters[f"{part} (frozen)"] == full.parameters[part]
    width = config.dtype.itemsize
    base = full.parameters["generator"] + full.parameters["adapter"]
    assert counted.memory["frozen weights"] == full.memory["frozen weights"] + width * base
    assert counted.memory["masters"] == 4 * trained
    assert counted.memory["optimizer moments"] == 8 * trained
    assert "activations, MLLM queries" not in counted.memory
    assert counted.flops["generator"] < full.flops["generator"]
    text = describe(counted, config)
    assert "LoRA" in text and "generator (frozen)" in text and "Frozen blocks take" in text
    assert "Frozen blocks" not in describe(full, config)


@pytest.mark.slow
def test_lora_on_a_tiny_qwen_image_learns_the_mixture(tmp_path):
    """From a random base to a file in diffusers' pipeline.

    Two ranks train on images and pairs at ZeRO stage 3 with recomputed blocks and a sharded base,
    are killed once and resumed, and sample on one rank at the end. All is bit by bit as without a
    kill and with a whole base. The held-out losses of both kinds fall.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    write_dataset(tmp_path / "shapes", num_images=256, size_px=32, seed=1)
    save_base(tmp_path / "base", condition_norm=True, positions="centred")
    settings = [
        *PIXEL_SPACE,
        f"data.shards={tmp_path / 'shapes'}",
        f"data.pairs={tmp_path / 'shapes'}",
        f"run.init={tmp_path / 'base'}",
        "train.data=mix",
        "train.global_batch=16",
        "train.threads=1",
        "train.steps=120",
        "train.recompute=99",
        "optim.lr=1e-2",
        "optim.warmup_steps=0",
        "ema.decay=0.9",
        "zero.stage=3",
        "checkpoint.every_steps=20",
        "log.sample_images=0",
        "data.heldout=8",
        "evaluate.every_steps=40",
        "evaluate.num_images=0",
        "lora.rank=8",
        "lora.alpha=8",
        "lora.dropout=0.05",
    ]
    whole, killed = (
        ["--stage", "finetune", *settings, f"run.dir={tmp_path / name}"]
        for name in ("whole", "killed")
    )
    done = start(2, *whole)
    assert done.returncode == 0, done.stdout
    killed += ["lora.shard_base=true", "log.sample_images=2", "log.sample_steps=1"]
    launch_and_kill(2, tmp_path / "killed/log.jsonl", 50, *killed)
    done = start(2, *killed, "--resume", "auto")
    assert list((tmp_path / "killed/samples").glob("step-00000120-*.png")), done.stdout
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    found = [
        row["heldout_loss"] for row in rows(tmp_path / "whole/log.jsonl") if row["step"] % 40 == 0
    ]
    assert found == [
        row["heldout_loss"] for row in rows(tmp_path / "killed/log.jsonl") if row["step"] % 40 == 0
    ]
    means = {kind: [losses[kind]["mean"] for losses in found] for kind in ("image", "pair")}
    assert all(a > b > c for a, b, c in means.values()), means
    assert main(["export", "--run", str(tmp_path / "killed")]) == 0
    assert main(["export", "--run", str(tmp_path / "killed"), "--merge"]) == 0
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=QwenImageTransformer2DModel.from_pretrained(tmp_path / "base"),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 64, 12, generator=random)
    condition = torch.randn(1, 7, pipeline.transformer.config.joint_attention_dim, generator=random)
    given = noisy, condition, None, torch.tensor([0.4]), [[(1, 8, 8)]]

    def velocity():
        with torch.no_grad():
            return pipeline.transformer(*given, return_dict=False)[0]

    before = velocity()
    pipeline.load_lora_weights(tmp_path / "killed/export/ema")
    after = velocity()
    merged = load_generator(tmp_path / "killed/export/ema-merged")
    ours = merged(noisy, given[3], condition, (8, 8))
    assert relative_error(after, before) > 0.05
    # Measured: 2e-6.
    assert relative_error(after, ours) <= 2e-5
