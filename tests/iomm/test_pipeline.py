"""Images from an exported folder: round trip, seeds, prompts, editing, invalid input."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_models import build

from iomm.config import InputError, PromptConfig
from iomm.pipeline import Pipeline, image_grid, sample_pixels, to_images

SETTINGS = dict(steps=2, guidance=2.0)


@pytest.fixture(
    scope="module",
    params=[{}, dict(connector_layers=1, conditions="all")],
    ids=["rqa", "connector, all"],
)
def folder(request, mllm, mllm_folder, tmp_path_factory):
    pipe = Pipeline(build(mllm, **request.param), 32, origin={"run": "runs/tiny"})
    return pipe.save_pretrained(
        tmp_path_factory.mktemp("export"), mllm=mllm_folder, vae="pixel:4"
    ), pipe


def arrays(images):
    return [np.asarray(image) for image in images]


def test_exported_folder_samples_the_same_images(folder, mllm_folder):
    path, pipe = folder
    again = Pipeline.from_pretrained(path, device="cpu", mllm=mllm_folder)
    for name, tensor in pipe.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert again.origin == {"run": "tiny"}
    prompts = ["a red circle", ""]
    for ours, theirs in zip(
        arrays(pipe(prompts, **SETTINGS)), arrays(again(prompts, **SETTINGS)), strict=True
    ):
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_card_keeps_the_prompts(folder, tmp_path, mllm_folder):
    pipe, plain = folder[1], folder[1].model.recipe
    prompt = PromptConfig(reconstruct=("x", "y"), caption="Draw {caption}.", empty="none")
    pipe.model.recipe = replace(plain, prompt=prompt)
    try:
        path = pipe.save_pretrained(tmp_path / "e", mllm=mllm_folder, vae="pixel:4")
        again = Pipeline.from_pretrained(path, device="cpu", mllm=mllm_folder)
        assert again.model.recipe.prompt == prompt
        # Without guidance the texts that the MLLM reads decide the image.
        settings = SETTINGS | dict(guidance=1.0)
        templated = arrays(again(["two", ""], **settings))
    finally:
        pipe.model.recipe = plain
    literal = arrays(pipe(["Draw two.", "none"], **settings))
    for ours, theirs in zip(templated, literal, strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_generator_loads_in_diffusers(folder):
    import diffusers

    diffusers.FluxTransformer2DModel.from_pretrained(folder[0])


def test_image_does_not_depend_on_its_list(folder):
    pipe = folder[1]
    both = arrays(pipe(["a red circle", "two blue squares"], seed=3, **SETTINGS))
    first = arrays(pipe("a red circle", seed=3, **SETTINGS))
    assert np.abs(both[0].astype(int) - first[0].astype(int)).max() <= 1
    other = arrays(pipe("a red circle", seed=4, **SETTINGS))
    assert np.abs(other[0].astype(int) - first[0].astype(int)).max() > 10
    pipe.batch = 1
    split = arrays(pipe(["a red circle", "two blue squares"], seed=3, **SETTINGS))
    pipe.batch = 16
    assert np.abs(both[1].astype(int) - split[1].astype(int)).max() <= 1


def test_image_depends_on_seed_and_number(folder):
    pipe = folder[1]
    three = arrays(
        pipe(
            ["a red circle", "two blue squares", "a red circle"], numbers=[7, 2**62, 9], **SETTINGS
        )
    )
    alone = arrays(pipe("two blue squares", numbers=[2**62], **SETTINGS))
    assert np.abs(three[1].astype(int) - alone[0]).max() <= 1
    assert np.abs(three[0].astype(int) - three[2]).max() > 10


def test_mllm_reads_each_distinct_prompt_once(folder, monkeypatch):
    pipe, sizes = folder[1], []
    original = pipe.model.encode_condition
    monkeypatch.setattr(
        pipe.model,
        "encode_condition",
        lambda condition: sizes.append(condition.batch) or original(condition),
    )
    pipe(["a red circle", "two", "a red circle", "a red circle"], steps=3, guidance=2.0)
    assert sizes == [2, 1]


def test_images_need_not_be_square(folder):
    pipe = folder[1]
    assert [image.size for image in pipe(["a red circle", "two"], size=(16, 48), **SETTINGS)] == [
        (48, 16)
    ] * 2
    assert pipe.edit(Image.new("RGB", (40, 40)), "make it red", size=(48, 16), **SETTINGS).size == (
        16,
        48,
    )


def test_edits_do_not_depend_on_their_list(folder):
    pipe = folder[1]
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "green")]
    texts = ["make it red", "make it much larger", "make it red"]
    pipe.batch = 2
    together = arrays(pipe.edit(images, texts, numbers=[3, 1, 2], **SETTINGS))
    pipe.batch = 16
    for image, text, number, edited in zip(images, texts, [3, 1, 2], together, strict=True):
        assert (
            np.abs(
                np.asarray(pipe.edit(image, text, numbers=[number], **SETTINGS)).astype(int)
                - edited
            ).max()
            <= 1
        )


def test_bfloat16_images_are_close_to_float32(folder, mllm_folder):
    exact = arrays(folder[1]("a red circle", **SETTINGS))[0].astype(int)
    half = arrays(
        Pipeline.from_pretrained(folder[0], device="cpu", dtype=torch.bfloat16, mllm=mllm_folder)(
            "a red circle", **SETTINGS
        )
    )[0]
    assert 0 < np.abs(exact - half).mean() < 4


def test_editing_depends_on_image_and_instruction(folder):
    pipe = folder[1]
    image = Image.fromarray((np.arange(48 * 40 * 3) % 255).astype(np.uint8).reshape(40, 48, 3))
    base = np.asarray(pipe.edit(image, "make it red", **SETTINGS)).astype(int)
    assert base.shape == (32, 32, 3)
    assert np.abs(np.asarray(pipe.edit(image, "make it blue now", **SETTINGS)) - base).max() > 0
    assert (
        np.abs(
            np.asarray(pipe.edit(Image.new("RGB", (40, 40)), "make it red", **SETTINGS)) - base
        ).max()
        > 0
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda pipe: pipe(5), "prompt must be a text or a list of texts, got 5"),
        (lambda pipe: pipe([]), "prompt must be a text or a list of texts"),
        (lambda pipe: pipe("long " * 300), "exceeds the MLLM's context of 256. Shorten"),
        (
            lambda pipe: pipe("", size=30),
            "image size must be a positive multiple of 4 px, got 30 x 30",
        ),
        (lambda pipe: pipe("", steps=0), "steps must be >= 1"),
        (lambda pipe: pipe("", method="rk4"), "sampler method must be one of euler, heun"),
        (
            lambda pipe: pipe.edit(Image.new("L", (8, 8)), "x"),
            "image must be a PIL image in mode RGB, got L",
        ),
        (
            lambda pipe: pipe.edit("photo.png", "x"),
            "image must be a PIL image in mode RGB, got str",
        ),
        (lambda pipe: pipe.edit(Image.new("RGB", (8, 8)), None), "instruction must be a text"),
        (
            lambda pipe: pipe.edit([], ["x"]),
            "edit needs an image for each instruction, got 0 images and 1 instructions",
        ),
        (
            lambda pipe: pipe(["x", "y"], numbers=[1]),
            "numbers must have one entry for each image, got 1 for 2",
        ),
    ],
)
def test_bad_input_raises_value_error(folder, call, message):
    with pytest.raises(ValueError) as error:
        call(folder[1])
    assert isinstance(error.value, InputError) and message in str(error.value)


def test_exported_folder_names_no_path_of_its_machine(folder, mllm_folder, tmp_path):
    path, pipe = folder
    text = "".join(file.read_text(errors="replace") for file in path.iterdir())
    assert str(mllm_folder) not in text and "runs/tiny" not in text
    name = re.escape(repr(mllm_folder.name))
    with pytest.raises(InputError, match=f"needs the MLLM .*folder named {name}.* with --mllm"):
        Pipeline.from_pretrained(path, device="cpu")
    # What ships with the package is named, and found wherever it is installed.
    shipped = pipe.save_pretrained(tmp_path / "shipped", mllm="shapes", vae="shapes")
    card = json.loads((shipped / "iomm.json").read_text())
    assert card["mllm"] == card["vae"] == "shapes"
    with pytest.raises(InputError, match=r"latent tokens of 48 .* but \S*/shapes/weights/vae and"):
        Pipeline.from_pretrained(shipped, device="cpu")


def test_folder_of_another_model_is_rejected(folder, mllm_folder, tmp_path):
    with pytest.raises(InputError, match=r"iomm\.json"):
        Pipeline.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="was trained with latent tokens of 48"):
        Pipeline.from_pretrained(folder[0], vae="pixel:8", device="cpu", mllm=mllm_folder)


def test_to_images_and_image_grid():
    images = to_images(torch.tensor([-1.0, 0.0, 1.0, 3.0])[:, None, None, None].expand(4, 3, 5, 6))
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 128, 255, 255]
    assert image_grid(images, 3).size == (3 * 8 - 2, 2 * 7 - 2)


def test_sample_pixels_without_guidance(folder):
    pipe = folder[1]
    condition = pipe.model.frozen[0].condition(["x"])
    assert sample_pixels(pipe.model, condition, torch.tensor([0]), size_px=32, steps=1).shape == (
        1,
        3,
        32,
        32,
    )


def script(name):
    """Import a file of benchmarks/ as a module.

    These scripts put the root first on sys.path, which is undone.
    """
    path = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.py"
    spec, before = importlib.util.spec_from_file_location(f"{name}_benchmark", path), list(sys.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_sampling_rate_becomes_readme_rows(folder):
    pipe = folder[1]
    pipe.batch = 2
    row = script("micro").sampling_rate(pipe, steps=3, guidance=2.0, size=(16, 32), batches=2)
    pipe.batch = 16
    assert row["images_per_s"] > 0 and len(row["batch_s"]) == 2 and row["batch"] == 2
    flops = pipe.model.generator.flops_per_image((4, 8), row["num_condition"])
    assert row["generator_tflop_per_image"] == pytest.approx(3 * 2 * flops / 1e12)
    ((what, figure),) = script("report").sampling({"rows": [row]})
    assert (
        what.startswith("sampling from text, 32 x 16 px")
        and "3 steps x 2 (guidance), batch 2" in what
        and "images/s" in figure
    )


@pytest.mark.slow
def test_compiled_blocks_sample_the_same_images(folder, mllm_folder):
    pipe = Pipeline.from_pretrained(folder[0], device="cpu", mllm=mllm_folder)
    prompts = ["a red circle", "two", "a red circle"]
    before = arrays(pipe(prompts, **SETTINGS))
    for ours, theirs in zip(arrays(pipe.compile()(prompts, **SETTINGS)), before, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1
