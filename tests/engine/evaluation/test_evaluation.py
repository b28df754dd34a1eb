"""Evaluation between steps: the loss is the formula's, alike on any number of ranks and for any run; pictures, scores, hooks."""

import io
import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from toy_models import build

from iomm.config import InputError
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
    """20 images and 12 pairs in batches of 8, half and half."""
    folder = tmp_path_factory.mktemp("worlds")
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
            EpochPermutation(3, its.shard_sizes, held_out=held_out(its.shard_sizes, HELD_OUT)), 32
        )
        for its in shards
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
        plan=MixtureSampler(3, 8, 4, *plans, 20),
    )


class Together(Exception):
    """Carries what a rank says to the others out of its pass, so that ranks can run one after the other."""


def ranks(rank=0, size=1, others=()):
    def all_of(value):
        if rank:
            raise Together(value)
        return [value, *others]

    return SimpleNamespace(
        rank=rank,
        size=size,
        first=rank == 0,
        device=torch.device("cpu"),
        all=all_of,
        on_first=lambda work: work(),
    )


def evaluation(source, *overrides, hook=None, **which):
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
    return Evaluation(config, source, ranks(**which), hook)


def masked(evaluation):
    """The same evaluation with pictures of masked images, as where there are no pairs."""
    evaluation.prompts = []
    return evaluation


def ask(model, work):
    with torch.no_grad(), fixed(model):
        return work(model)


def test_the_loss_is_that_of_the_formula_at_each_time(source, mllm):
    model, ours = build(mllm), evaluation(source)
    found = ask(model, lambda model: {kind: ours.loss(model, kind) for kind in ("image", "pair")})
    assert ours.heldout["image"].tolist() == held_out_entries([8, 8, 4], HELD_OUT).tolist()
    assert ours.heldout["pair"].tolist() == [20 + k for k in held_out_entries([8, 4], HELD_OUT)]
    for kind, result in found.items():
        expected = np.zeros(len(TIMES))
        for batch in ours.batches(kind, ours.heldout[kind]):
            assert (
                batch.has_image == [kind == "image"] * 4
                and batch.entry_B.tolist()[0] in ours.heldout[kind]
            )
            with torch.no_grad(), fixed(model):
                n_B = batch.n_B + FIRST_N
                latents = model.encode(batch.pixels_BCHW, n_B)
                (image, _), (noise, _) = (
                    noisy_tokens(latents, torch.full((4,), t), SEED, n_B, model.frozen[1].patch)
                    for t in (0.0, 1.0)
                )
                read = model.read(
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


def test_two_ranks_find_what_one_finds_to_the_bit(source, mllm):
    model = build(mllm)
    for work in (
        lambda e: lambda model: e.loss(model, "image"),
        lambda e: lambda model: e.loss(model, "pair"),
        lambda e: lambda model: [np.asarray(image).tolist() for image in e.pictures(model).drawn],
        lambda e: (
            lambda model: [
                np.asarray(image).tolist()
                for row in masked(e).pictures(model).rows.values()
                for image in row
            ]
        ),
    ):
        one = ask(model, work(evaluation(source)))
        with pytest.raises(Together) as said:
            ask(model, work(evaluation(source, rank=1, size=2)))
        assert ask(model, work(evaluation(source, size=2, others=said.value.args))) == one


def test_it_depends_on_the_weights_and_on_nothing_else_of_the_run(source, mllm):
    model, ours = build(mllm), evaluation(source)
    before = ask(model, lambda model: ours.loss(model, "pair"))
    images = ask(model, lambda model: ours.loss(model, "image"))
    recipe = model.recipe = replace(model.recipe, seed=99, caption_drop=1.0)
    assert ask(model, lambda model: ours.loss(model, "pair")) == before and model.recipe is recipe
    assert ask(model, lambda model: ours.loss(model, "image")) == images
    model.recipe = replace(recipe, mask=replace(recipe.mask, ratio=0.9))
    assert ask(model, lambda model: ours.loss(model, "image")) != images
    with torch.no_grad():
        model.generator.final.weight.mul_(1.1)
    assert ask(model, lambda model: ours.loss(model, "pair")) != before


def state_of(model, step):
    return SimpleNamespace(
        step=step,
        ema=SimpleNamespace(flats=[]),
        sharded=SimpleNamespace(with_weights=lambda flats: nullcontext(model.requires_grad_(False))),
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
def test_a_row_of_the_log_a_picture_and_a_hook(source, mllm, tmp_path, prompts, shown):
    seen = []

    def hook(config, step, images, texts):
        seen.append((config.run.dir, step, texts, [image.size for image in images]))
        return {"brightness": np.float32(0.5), "count": len(images)}

    overrides = [f"run.dir={tmp_path}", *([f"evaluate.prompts={prompts}"] if prompts else [])]
    ours = evaluation(source, *overrides, hook=hook)
    assert [step for step in range(1, 27) if ours.due(step)] == [10, 20, 25]
    row = ours(state_of(build(mllm), 20))
    assert set(row) == {"heldout_loss", "samples", "scores", "metrics"} and set(
        row["heldout_loss"]
    ) == {"image", "pair"}
    assert row["metrics"] == {"brightness": 0.5, "count": 5.0}
    captions = [source.shards.caption(k) for k in ours.heldout["pair"][:5].tolist()]
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


def test_a_run_on_images_shows_what_it_draws_of_masked_ones(source, mllm, tmp_path):
    bare = SimpleNamespace(
        shards=source.shards.images, latents=None, encoded=False, decoder=source.decoder
    )
    ours = evaluation(bare, f"run.dir={tmp_path}", "data.heldout=0")
    model = build(mllm)
    row = ours(state_of(model, 25))
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
        original, visible, drawn = (
            np.asarray(picture).reshape(4, 8, 4, 8, 3).swapaxes(1, 2) for picture in pictures
        )
        assert ((original == visible).all((2, 3, 4)) == visible_YX.numpy()).all() and (
            drawn != original
        ).any()
        assert np.unique(visible[~visible_YX.numpy()]).tolist() == [150, 185]


def test_the_visible_part_is_that_of_the_image_tokens(mllm):
    """The image token that changes most with a patch is the one whose patch visible_parts shows or hides."""
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


def test_pictures_are_scored_against_the_prompt_or_the_caption_of_the_masked_image(
    source, mllm, tmp_path
):
    shards = source.shards.images
    bare = SimpleNamespace(shards=shards, latents=None, encoded=False, decoder=source.decoder)
    ours = evaluation(bare, f"run.dir={tmp_path}")
    entries = ours.drawn["image"].tolist()
    real = [Image.open(io.BytesIO(shards.image_bytes(k))).convert("RGB") for k in entries]
    captions = [shards.caption(k) for k in entries]
    assert all(score(picture, caption)["fits"] for picture, caption in zip(real, captions))
    assert ours.score(1, Pictures({"drawn": real}, [None] * 5)) == dict.fromkeys(SCORED, 1.0)
    turned = [*real[:3], *real[3:][::-1]]
    expected = [score(picture, caption) for picture, caption in zip(turned, captions)]
    found = ours.score(1, Pictures({"drawn": turned}, [None] * 5))
    assert (
        found == {key: sum(one[key] for one in expected) / 5 for key in SCORED}
        and found["fits"] == 0.6
    )
    asked = evaluation(source, "evaluate.prompts=a red circle | a photo of a bench")
    pictures = Pictures(
        {"drawn": real}, ["a red circle", "a photo of a bench"] * 2 + ["a red circle"]
    )
    assert asked.score(1, pictures) == {
        key: sum(score(real[i], "a red circle")[key] for i in (0, 2, 4)) / 3 for key in SCORED
    }
    assert asked.score(1, pictures._replace(prompts=["a photo of a bench"] * 5)) == {}
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


def test_a_scorer_that_fails_and_data_of_other_kinds_cost_no_run(source, mllm, tmp_path, capsys):
    ours = evaluation(source)
    assert ours.score(7, Pictures({"drawn": [None]}, ["a red circle"])) == {}
    assert capsys.readouterr().out.startswith("step 7: the pictures are not scored: ")
    other = evaluation(source, f"run.dir={tmp_path}", "data.shards=photos/*.tar", "data.heldout=0")
    assert set(other(state_of(build(mllm), 20))) == {"samples"}


def test_a_hook_that_fails_is_said_and_stops_nothing(source, capsys):
    ours = evaluation(source, hook=lambda *_: {}["nothing"])
    assert (
        ours.ask(7, [], []) == {}
        and "step 7: the hook failed: KeyError: 'nothing'" in capsys.readouterr().out
    )


def test_only_the_command_line_can_name_a_hook():
    assert load_hook("os.path:join")("a", "b") == "a/b"
    assert not [key for key in all_keys(RunConfig) if "hook" in key]
    for name, words in (
        ("nowhere:f", "No module named 'nowhere'"),
        ("os.path:nothing", "has no attribute"),
        ("os.path:sep", "sep is not a function"),
        ("", "wanted package.module:function"),
    ):
        with pytest.raises(InputError, match="--hook") as error:
            load_hook(name)
        assert words in str(error.value)


def test_a_sample_that_is_not_finite_says_so_and_spoils_no_other(source, mllm):
    model = build(mllm)
    batch = next(iter(evaluation(source).batches("pair", evaluation(source).heldout["pair"])))
    batch.pixels_BCHW[1] = float("nan")
    losses = ask(model, lambda model: losses_at(model, batch))
    assert losses[1].isnan().all() and losses[[0, 2, 3]].isfinite().all() and losses.shape == (4, 8)
