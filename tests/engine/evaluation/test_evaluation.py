"""Evaluation between steps: the loss on any number of ranks, samples, scores, hooks."""

import io
import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from toy_models import build

from iomm.caption_limit import CaptionLimit
from iomm.config import AdapterConfig, InputError, PromptConfig
from iomm.engine.config import RunConfig, all_keys, parse
from iomm.engine.data.index import build as build_index
from iomm.engine.data.mixture import Joined, MixtureSampler
from iomm.engine.data.samplers import EpochPermutation, FixedSizeSampler, held_out, held_out_entries
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.engine.evaluation.heldout import (
    FIRST_N,
    SCORED,
    SEED,
    TIMES,
    Evaluation,
    Pictures,
    fixed,
    load_hook,
    losses_at,
)
from iomm.engine.evaluation.sample import visible_parts
from iomm.engine.observe.metrics import line, scalars
from iomm.engine.observe.report import read_grid
from iomm.engine.shapes.dataset import write_dataset
from iomm.engine.shapes.scorer import score
from iomm.kernels.noisy_tokens import noisy_tokens
from iomm.masking import visible_mask

HELD_OUT = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory, mllm):
    """Batches of 8, half of them from 20 images and half from 12 pairs."""
    folder = tmp_path_factory.mktemp("datasets")
    shards = [
        Shards(
            build_index(
                write_dataset(folder / name, num_images=num, size_px=48, seed=seed, shard_size=8),
                folder / f"{name}-index",
                progress=False,
            )
        )
        for name, num, seed in (("images", 20, 1), ("pairs", 12, 2))
    ]
    plans = [
        FixedSizeSampler(
            EpochPermutation(3, part.shard_sizes, held_out=held_out(part.shard_sizes, HELD_OUT)), 32
        )
        for part in shards
    ]
    return ImageSource(
        Joined(*shards),
        seed=3,
        global_batch=8,
        micro_batch=8,
        rank=0,
        world_size=1,
        size_px=32,
        vit_px=mllm.vit_px,
        device="cpu",
        num_steps=5,
        sampler=MixtureSampler(3, 8, 4, *plans, 20),
    )


class Gathered(Exception):
    """Carries the value that a rank contributes to a gather out of its pass.

    Ranks can then run one after the other in one process.
    """


def ranks(rank=0, size=1, others=()):
    def all_of(value):
        if rank:
            raise Gathered(value)
        return [value, *others]

    return SimpleNamespace(
        rank=rank,
        size=size,
        first=rank == 0,
        device=torch.device("cpu"),
        all=all_of,
        on_first=lambda work: work(),
    )


def evaluation(source, *overrides, hook=None, **rank):
    config = parse(
        "",
        overrides=[
            "data.size_px=32",
            f"data.heldout={HELD_OUT}",
            "evaluate.micro_batch=4",
            "evaluate.num_images=5",
            "evaluate.steps=2",
            "evaluate.every_steps=10",
            "train.steps=25",
            *overrides,
        ],
    )
    return Evaluation(config, source, ranks(**rank), hook)


def masked(evaluation):
    """Return the evaluation with samples from masked images, as in a run without pairs."""
    evaluation.prompts = []
    return evaluation


def run_fixed(model, work):
    with torch.no_grad(), fixed(model):
        return work(model)


def test_loss_matches_the_formula_at_each_time(source, mllm):
    model, evaluator = build(mllm), evaluation(source)
    found = run_fixed(
        model, lambda model: {kind: evaluator.loss(model, kind) for kind in ("image", "pair")}
    )
    assert evaluator.heldout["image"].tolist() == held_out_entries([8, 8, 4], HELD_OUT).tolist()
    assert evaluator.heldout["pair"].tolist() == [
        20 + k for k in held_out_entries([8, 4], HELD_OUT)
    ]
    for kind, result in found.items():
        expected = np.zeros(len(TIMES))
        for batch in evaluator.batches(kind, evaluator.heldout[kind]):
            assert (
                batch.has_image == [kind == "image"] * 4
                and batch.entry_B.tolist()[0] in evaluator.heldout[kind]
            )
            with torch.no_grad(), fixed(model):
                n_B = batch.n_B + FIRST_N
                latents = model.encode(batch.pixels_BCHW, n_B)
                (image, _), (noise, _) = (
                    noisy_tokens(latents, torch.full((4,), t), SEED, n_B, model.frozen[1].patch)
                    for t in (0.0, 1.0)
                )
                read = model.encode_condition(
                    model.condition(batch.vit_pixels_BHWC, n_B, batch.captions, batch.has_image)
                )
                for i, t in enumerate(TIMES):
                    velocity = model.velocity(
                        (1 - t) * image + t * noise, torch.full((4,), t), *read, (8, 8)
                    )
                    errors = (velocity - (noise - image)).square().mean(dim=(1, 2))
                    expected[i] += float(errors[batch.n_B < HELD_OUT].sum()) / HELD_OUT
        assert result["by_time"] == pytest.approx(expected.tolist(), rel=1e-5) and result[
            "mean"
        ] == pytest.approx(expected.mean(), rel=1e-5)
    assert TIMES == (0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375)


def test_two_ranks_equal_one_bitwise(source, mllm):
    model = build(mllm)
    for work in (
        lambda e: lambda model: e.loss(model, "image"),
        lambda e: lambda model: e.loss(model, "pair"),
        lambda e: lambda model: [np.asarray(image).tolist() for image in e.pictures(model).samples],
        lambda e: (
            lambda model: [
                np.asarray(image).tolist()
                for row in masked(e).pictures(model).rows.values()
                for image in row
            ]
        ),
    ):
        one = run_fixed(model, work(evaluation(source)))
        with pytest.raises(Gathered) as gathered:
            run_fixed(model, work(evaluation(source, rank=1, size=2)))
        assert run_fixed(model, work(evaluation(source, size=2, others=gathered.value.args))) == one


def test_loss_depends_only_on_weights_and_mask_ratio(source, mllm):
    model, evaluator = build(mllm), evaluation(source)
    before = run_fixed(model, lambda model: evaluator.loss(model, "pair"))
    images = run_fixed(model, lambda model: evaluator.loss(model, "image"))
    recipe = model.recipe = replace(model.recipe, seed=99, caption_drop=1.0)
    assert (
        run_fixed(model, lambda model: evaluator.loss(model, "pair")) == before
        and model.recipe is recipe
    )
    assert run_fixed(model, lambda model: evaluator.loss(model, "image")) == images
    model.recipe = replace(recipe, mask=replace(recipe.mask, ratio=0.9))
    assert run_fixed(model, lambda model: evaluator.loss(model, "image")) != images
    with torch.no_grad():
        model.generator.final.weight.mul_(1.1)
    assert run_fixed(model, lambda model: evaluator.loss(model, "pair")) != before


def state_of(model, step):
    return SimpleNamespace(
        step=step,
        ema=SimpleNamespace(flats=[]),
        sharded=SimpleNamespace(
            with_weights=lambda flats: nullcontext(model.requires_grad_(False))
        ),
    )


@pytest.mark.parametrize(
    "prompts, shown",
    [
        (
            "a red circle | two blue squares",
            [
                "a red circle",
                "two blue squares",
                "a red circle",
                "two blue squares",
                "a red circle",
            ],
        ),
        (None, None),
    ],
)
def test_evaluation_returns_a_log_row_with_grid_and_hook(source, mllm, tmp_path, prompts, shown):
    seen = []

    def hook(config, step, images, texts):
        seen.append((config.run.dir, step, texts, [image.size for image in images]))
        return {"brightness": np.float32(0.5), "count": len(images)}

    overrides = [f"run.dir={tmp_path}", *([f"evaluate.prompts={prompts}"] if prompts else [])]
    evaluator = evaluation(source, *overrides, hook=hook)
    assert [step for step in range(1, 27) if evaluator.due(step)] == [10, 20, 25]
    row = evaluator(state_of(build(mllm), 20))
    assert set(row) == {"heldout_loss", "samples", "scores", "metrics"} and set(
        row["heldout_loss"]
    ) == {"image", "pair"}
    assert row["metrics"] == {"brightness": 0.5, "count": 5.0}
    captions = [source.shards.caption(k) for k in evaluator.heldout["pair"][:5].tolist()]
    assert (
        seen == [(str(tmp_path), 20, shown or captions, [(32, 32)] * 5)] and len(set(captions)) > 1
    )
    grid = Image.open(row["samples"]).text
    assert json.loads(grid.pop("grid")) == {
        "columns": 5,
        "rows": ["drawn"],
        "labels": shown or captions,
    }
    assert grid == {
        "run": str(tmp_path),
        "step": "20",
        "weights": "raw",
        "size": "32x32",
        "steps": "2",
        "seed": "0",
        "guidance": "1",
        "prompt": "\n".join(dict.fromkeys(shown or captions)),
    }
    assert Image.open(row["samples"]).size == (5 * 34 - 2, 32) and row["samples"].endswith(
        "samples/evaluate-00000020.png"
    )
    flat = scalars(row)
    assert (
        flat["heldout_loss/pair/by_time/7"] == row["heldout_loss"]["pair"]["by_time"][7]
        and flat["metrics/count"] == 5
    )


def test_prompts_longer_than_the_context_are_cut(source, mllm, tmp_path, monkeypatch, caplog):
    limit = CaptionLimit(mllm, AdapterConfig(num_queries=8, head_dim=16), PromptConfig())
    monkeypatch.setattr(source, "caption_limit", limit)
    long = "a dog and a cat " * 60
    with caplog.at_level("WARNING", logger="iomm"):
        evaluator = evaluation(source, f"run.dir={tmp_path}", f"evaluate.prompts=a dog | {long}")
    assert evaluator.prompts == ["a dog", limit.cut(long.strip())] and "are cut" in caplog.text
    monkeypatch.setattr(source.shards, "caption", lambda k: long)
    evaluator = evaluation(source, f"run.dir={tmp_path}")
    assert set(evaluator.prompts) == {limit.cut(long)}
    row = evaluator(state_of(build(mllm), 25))
    assert row["samples"] and row["heldout_loss"]["pair"]["mean"] > 0


def test_run_on_images_samples_from_masked_images(source, mllm, tmp_path):
    bare = SimpleNamespace(
        shards=source.shards.images,
        latents=None,
        encoded=False,
        decoder=source.decoder,
        caption_limit=None,
    )
    evaluator = evaluation(bare, f"run.dir={tmp_path}", "data.heldout=0")
    model = build(mllm)
    row = evaluator(state_of(model, 25))
    assert set(row) == {"samples", "scores"} and Image.open(row["samples"]).size == (
        5 * 34 - 2,
        3 * 34 - 2,
    )
    assert set(
        evaluation(bare, f"run.dir={tmp_path}", "evaluate.num_images=0")(state_of(model, 25))
    ) == {"heldout_loss"}
    grid = read_grid(tmp_path / "samples/evaluate-00000025.png")
    mask = visible_mask(model.recipe.mask, SEED, FIRST_N + torch.arange(5), 16).view(5, 4, 4)
    for visible_YX, *pictures in zip(mask, *(row.values() for row in grid.values()), strict=True):
        original, visible, sample = (
            np.asarray(picture).reshape(4, 8, 4, 8, 3).swapaxes(1, 2) for picture in pictures
        )
        assert ((original == visible).all((2, 3, 4)) == visible_YX.numpy()).all() and (
            sample != original
        ).any()
        assert np.unique(visible[~visible_YX.numpy()]).tolist() == [150, 185]


def test_visible_parts_match_the_image_tokens(mllm):
    """visible_parts shows the patch of a token if and only if the mask keeps the token.

    The token of a patch is the one that changes most when the patch changes.
    """
    model, image = (
        build(mllm),
        torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    )
    before = mllm.image_tokens(image)
    black = Image.new("RGB", (48, 48))
    mask = visible_mask(model.recipe.mask, model.recipe.seed, torch.arange(3), 16).view(3, 16)
    shown = [np.asarray(picture) for picture in visible_parts(model, torch.arange(3), [black] * 3)]
    for row in range(4):
        for column in range(4):
            changed = image.clone()
            changed[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 3
            token = int((mllm.image_tokens(changed) - before)[0].norm(dim=1).argmax())
            for n in range(3):
                patch = shown[n][12 * row : 12 * row + 12, 12 * column : 12 * column + 12]
                assert bool((patch == 0).all()) == bool(mask[n, token]) and bool(
                    (patch > 0).all()
                ) != bool(mask[n, token])


def test_samples_are_scored_against_prompt_or_caption(source, mllm, tmp_path):
    shards = source.shards.images
    bare = SimpleNamespace(
        shards=shards,
        latents=None,
        encoded=False,
        decoder=source.decoder,
        caption_limit=None,
    )
    evaluator = evaluation(bare, f"run.dir={tmp_path}")
    entries = evaluator.pictured["image"].tolist()
    real = [Image.open(io.BytesIO(shards.image_bytes(k))).convert("RGB") for k in entries]
    captions = [shards.caption(k) for k in entries]
    assert all(
        score(picture, caption)["fits"] for picture, caption in zip(real, captions, strict=True)
    )
    assert evaluator.score(1, Pictures({"drawn": real}, [None] * 5)) == dict.fromkeys(SCORED, 1.0)
    permuted = [*real[:3], *real[3:][::-1]]
    expected = [
        score(picture, caption) for picture, caption in zip(permuted, captions, strict=True)
    ]
    found = evaluator.score(1, Pictures({"drawn": permuted}, [None] * 5))
    assert (
        found == {key: sum(one[key] for one in expected) / 5 for key in SCORED}
        and found["fits"] == 0.6
    )
    prompted = evaluation(source, "evaluate.prompts=a red circle | a photo of a bench")
    pictures = Pictures(
        {"drawn": real}, ["a red circle", "a photo of a bench"] * 2 + ["a red circle"]
    )
    assert prompted.score(1, pictures) == {
        key: sum(score(real[i], "a red circle")[key] for i in (0, 2, 4)) / 3 for key in SCORED
    }
    assert prompted.score(1, pictures._replace(prompts=["a photo of a bench"] * 5)) == {}
    row = dict(
        step=1,
        loss=1.0,
        align_loss=None,
        grad_norm=1.0,
        lr=1e-3,
        step_s=1.0,
        time_s={"data": 1.0},
        mfu=None,
        images_per_s=1.0,
        tokens_per_s=1.0,
        data_wait_s=0.0,
        gpu_hours=0.0,
        gpu_hours_left=0.0,
    )
    assert "fits 60%" in line(row | {"scores": found}, 10) and "fits" not in line(row, 10)


def test_scorer_failure_and_foreign_data_do_not_raise(source, mllm, tmp_path, caplog):
    evaluator = evaluation(source)
    assert evaluator.score(7, Pictures({"drawn": [None]}, ["a red circle"])) == {}
    ((name, level, message),) = caplog.record_tuples
    assert (name, level) == ("iomm", logging.WARNING)
    assert message.startswith("step 7: the samples were not scored: ")
    other = evaluation(source, f"run.dir={tmp_path}", "data.shards=photos/*.tar", "data.heldout=0")
    assert set(other(state_of(build(mllm), 20))) == {"samples"}


def test_hook_failure_is_logged_and_not_raised(source, caplog):
    evaluator = evaluation(source, hook=lambda *_: {}["nothing"])
    assert evaluator.call_hook(7, [], []) == {}
    assert caplog.record_tuples == [
        ("iomm", logging.WARNING, "step 7: the hook failed: KeyError: 'nothing'")
    ]


def test_unwritable_grid_is_logged_and_not_raised(source, mllm, tmp_path, caplog):
    (tmp_path / "samples").write_text("a file in the place of the folder")
    evaluator = evaluation(source, f"run.dir={tmp_path}", "data.heldout=0")
    assert evaluator(state_of(build(mllm), 20))["samples"] is None
    assert caplog.messages[0].startswith("step 20: the sample grid was not written: ")


def test_hook_comes_only_from_the_command_line():
    assert load_hook("os.path:join")("a", "b") == "a/b"
    assert not [key for key in all_keys(RunConfig) if "hook" in key]
    for name, words in (
        ("nowhere:f", "No module named 'nowhere'"),
        ("os.path:nothing", "has no attribute"),
        ("os.path:sep", "sep is not a function"),
        ("", "expected package.module:function"),
    ):
        with pytest.raises(InputError, match="--hook") as error:
            load_hook(name)
        assert words in str(error.value)


def test_nonfinite_sample_affects_only_its_own_loss(source, mllm):
    model = build(mllm)
    batch = next(iter(evaluation(source).batches("pair", evaluation(source).heldout["pair"])))
    batch.pixels_BCHW[1] = float("nan")
    losses = run_fixed(model, lambda model: losses_at(model, batch))
    assert losses[1].isnan().all() and losses[[0, 2, 3]].isfinite().all() and losses.shape == (4, 8)
