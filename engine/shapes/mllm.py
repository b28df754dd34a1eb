"""The tiny MLLM of the shapes dataset: InternVL's architecture at 1 / 1000 of its size.

Input pictures have 32 px and become 16 image tokens. The width is 192. The model learns to
understand, not to generate: picture -> caption, caption -> the same caption, and picture plus
instruction -> caption of the edited picture. It is trained on the dataset's "train" split only.

model.mllm=shapes selects the one in WEIGHTS. The header of its model.safetensors holds its
accuracies and how it was made. This command trains another one from scratch on the schedule in
LEGS, for use as model.mllm=FOLDER. A killed command resumes when it is started again:

    python -m iomm.engine.shapes.mllm --out FOLDER
"""

import argparse
import io
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from iomm.config import RECONSTRUCT, InputError
from iomm.engine import arguments
from iomm.engine.data.atomic import whole_file
from iomm.engine.shapes.dataset import VERSION, edit, render, scene
from iomm.internvl import byte_tokenizer, internvl_config
from iomm.kernels.dispatch import cpu_has_bf16
from iomm.mllm import IMAGE, IMAGE_MEAN, IMAGE_STD, TURN

logger = logging.getLogger("iomm")

VISION = dict(
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=512,
    image_size=32,
    patch_size=4,
    attention_bias=True,
)
TEXT = dict(
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=512,
    max_position_embeddings=512,
)
# User texts that request the caption of a picture.
CAPTION_PROMPTS = ("", RECONSTRUCT, "Describe the image.")
WEIGHTS = Path(__file__).parent / "weights"
# Share of each task in a batch: picture -> caption, caption -> caption, edits.
TASKS = {"caption": 0.75, "read": 0.0625, "edit": 0.1875}
# The state of an unfinished run: weights, optimizer moments, position in the schedule.
STATE = "state.pt"
# Seconds per step, measured on two cores with bf16 and on two cores with only AVX2.
STEP_S = 0.3, 1.3


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One part of the training schedule: 100 steps of warm-up, then a cosine that ends at 0."""

    steps: int
    batch: int
    lr: float
    # Number of pictures of the dataset, each with 3 wordings of the prompt.
    images: int


# Measured after the three legs, on both machines of STEP_S: 95.6, 98.8 and 99.4 % of new pictures
# were captioned exactly.
LEGS = (
    Leg(steps=5000, batch=64, lr=1e-3, images=16_000),
    Leg(steps=3000, batch=64, lr=7e-4, images=64_000),
    Leg(steps=3000, batch=64, lr=5e-4, images=64_000),
)


def create_mllm(
    folder: str | Path,
    *,
    texts: Iterable[str],
    vision: dict,
    text: dict,
    seed: int = 0,
    vocab_size: int = 512,
) -> str | Path:
    """Write a new InternVL with random weights in transformers' format, and return the folder.

    Args:
        folder: where to write.
        texts: strings on which the BPE vocabulary is trained. It is byte-level, so any other text
            can be encoded as well.
        vision: keyword arguments of InternVLVisionConfig.
        text: keyword arguments of the decoder's config, which is a Qwen2Config unless model_type is
            qwen3.
        seed: seed of the weights, which are drawn on the CPU.
        vocab_size: maximum number of tokens in the vocabulary.
    """
    from transformers import InternVLForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    tokenizer = byte_tokenizer(texts, vocab_size)
    config = internvl_config(
        vision,
        {**text, "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Captioner(nn.Module):
    """An InternVL with its language-model head, for training on captions.

    A sample is one turn: [user: text, image] -> [assistant: answer]. The folder is one that
    create_mllm or save wrote.
    """

    def __init__(self, folder: str | Path):
        from transformers import AutoTokenizer, InternVLForConditionalGeneration

        super().__init__()
        self.internvl = InternVLForConditionalGeneration.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def forward(
        self,
        texts: Sequence[str],
        answers: Sequence[str],
        vit_pixels_ICHW: Tensor | None,
        has_image: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and which answers are exactly right.

        Args:
            texts: B user texts.
            answers: B target texts.
            vit_pixels_ICHW: ViT pixels of the samples with an image, in order, or None.
            has_image: B bools.

        Returns:
            The mean cross-entropy of the answers' tokens, a scalar, and (B,) bool: True if the most
            probable tokens are exactly the answer. Greedy decoding then returns it.
        """
        config = self.internvl.config
        rows = []
        for text, answer, image in zip(texts, answers, has_image, strict=True):
            middle = (
                IMAGE[0] + "<IMG_CONTEXT>" * config.image_seq_length + IMAGE[1] if image else ""
            )
            prompt_ids, answer_ids = (
                self.tokenizer(part, add_special_tokens=False)["input_ids"]
                for part in (TURN[0] + text + middle + TURN[1], answer + "<|im_end|>")
            )
            ids = torch.tensor(prompt_ids + answer_ids)
            labels = torch.tensor([-100] * len(prompt_ids) + answer_ids)
            rows.append((ids, labels))
        ids_BT, labels_BT = (
            torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding)
            for column, padding in zip(
                zip(*rows, strict=True), (self.tokenizer.pad_token_id, -100), strict=True
            )
        )
        attention_mask_BT = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(row), dtype=torch.long) for row, _ in rows], batch_first=True
        )
        logits_BTV = self.internvl(
            input_ids=ids_BT,
            attention_mask=attention_mask_BT,
            pixel_values=vit_pixels_ICHW,
            use_cache=False,
        ).logits[:, :-1]
        labels_BT = labels_BT[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=-100
        )
        right_BT = (logits_BTV.argmax(-1) == labels_BT) | (labels_BT == -100)
        return loss, right_BT.all(1)

    def save(self, folder: str | Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        """Write weights of `dtype`, config and tokenizer in transformers' format.

        The metadata are added to the header of model.safetensors.
        """
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        self.internvl.to(dtype).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = {**file.metadata(), **metadata}
        save_file(load_file(path), path, metadata=metadata)


class CaptionBatch(NamedTuple):
    """The arguments of Captioner.forward."""

    texts: list[str]
    answers: list[str]
    # Of the samples that have an image, in order. None if there are none.
    vit_pixels_ICHW: Tensor | None
    has_image: list[bool]


class Examples:
    """The training examples of `num` scenes of a split, from number `start` on.

    Pictures are stored as uint8 ViT pixels. They have passed through JPEG and the same cubic resize
    as the pictures of a training run.
    """

    def __init__(self, seed: int, start: int, num: int, split: str):
        side = VISION["image_size"]
        self.scenes = [scene(seed, i, split) for i in range(start, start + num)]
        self.pixels_NCHW = torch.stack(
            [vit_bytes(render(picture), side) for picture in self.scenes]
        )
        self.seed, self.split = seed, split
        self.editable = [i for i, picture in enumerate(self.scenes) if len(picture.shapes) == 1]

    def batch(self, tasks: Sequence[str], numbers: Sequence[int]) -> CaptionBatch:
        """Return the batch of one task and one number per sample.

        The number selects the scene and the wording.
        """
        texts, answers, shown = [], [], []
        for task, n in zip(tasks, numbers, strict=True):
            if task == "edit":
                i = self.editable[n % len(self.editable)]
                text, answer = edit(self.scenes[i], self.seed, n, self.split)
            else:
                i = n % len(self.scenes)
                answer = self.scenes[i].caption
                wording = n // len(self.scenes) % len(CAPTION_PROMPTS)
                text = answer if task == "read" else CAPTION_PROMPTS[wording]
            texts.append(text)
            answers.append(answer)
            if task != "read":
                shown.append(i)
        return CaptionBatch(
            texts,
            answers,
            normalised(self.pixels_NCHW[shown]) if shown else None,
            [task != "read" for task in tasks],
        )


def normalised(bytes_CHW: Tensor) -> Tensor:
    """Return uint8 pixels (..., 3, H, W) with the mean and variance that the ViT expects."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    return (bytes_CHW / 255 - mean) / std


def vit_pixels(picture: Image.Image, side: int, size_px: int) -> Tensor:
    """Return the ViT pixels (3, side, side) that the loader of a run at size_px makes of a picture.

    The loader decodes the JPEG, crops to the VAE's size_px, resizes the crop, and normalises it.
    """
    return normalised(resized(vit_bytes(picture, size_px), side))


def vit_bytes(picture: Image.Image, side: int) -> Tensor:
    """Return a picture as uint8 (3, side, side), encoded to JPEG, decoded and resized."""
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=92, subsampling=0)
    pixels_HWC = torch.frombuffer(
        bytearray(Image.open(jpeg).convert("RGB").tobytes()), dtype=torch.uint8
    )
    image_1CHW = pixels_HWC.view(picture.height, picture.width, 3).permute(2, 0, 1)[None]
    return resized(image_1CHW[0], side)


def resized(bytes_CHW: Tensor, side: int) -> Tensor:
    """Resize uint8 pixels (3, H, W) by cubic interpolation to (3, side, side)."""
    return torch.nn.functional.interpolate(
        bytes_CHW[None], size=(side, side), mode="bicubic", antialias=True
    )[0]


def train(
    out: str | Path,
    *,
    legs: tuple[Leg, ...] = LEGS,
    seed: int = 0,
    num_scored: int = 2000,
    save_steps: int = 250,
) -> dict[str, float]:
    """Train the MLLM from scratch, write it to `out`, and return its accuracies.

    Each leg starts with a new AdamW. After the leg the weights are rounded to bf16, as in the file,
    and evaluated. The state of an unfinished run is written to `out`.unfinished every save_steps
    steps. A killed run that is started again with the same legs and seed resumes there and ends
    with the same weights. The metadata of the weights hold the accuracies and the settings of every
    leg.

    Args:
        out: folder of the weights.
        legs: the schedule.
        seed: seed of scenes, weights and batches.
        num_scored: pictures of each split on which the accuracies are measured.
        save_steps: steps between two saves of the state.

    Raises:
        InputError: if `out` exists, or if the unfinished run has other legs or another seed.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists. Give another --out, or remove it first.")
    folder = out.with_name(f"{out.name}.unfinished")
    settings = {
        "legs": [asdict(leg) for leg in legs],
        "seed": seed,
        "tasks": TASKS,
        # Version of the dataset, under the key that existing weight files use.
        "world": VERSION,
    }
    state = resume(folder, settings)
    if state is None:
        state = {
            "settings": json.dumps(settings),
            "leg": 0,
            "step": 0,
            "seconds": 0.0,
            "found": "[]",
        }
        shutil.rmtree(folder, ignore_errors=True)
        create_mllm(folder, texts=vocabulary(seed), vision=VISION, text=TEXT, seed=seed)
    model = Captioner(folder)
    if "model" in state:
        model.internvl.load_state_dict(state["model"])
    found = json.loads(state["found"])
    for i, leg in enumerate(legs[state["leg"] :], state["leg"]):
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=leg.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        if "optimizer" in state:
            optimizer.load_state_dict(state.pop("optimizer"))
        first, before_s = state["step"], state["seconds"]
        logger.info(f"leg {i + 1} of {len(legs)}: {leg}, from step {first}")
        examples = Examples(seed, 0, leg.images, "train")
        begun = time.monotonic()
        for step in range(first, leg.steps):
            loss = train_step(model, optimizer, examples, leg, seed=seed, i=i, step=step)
            spent_s = time.monotonic() - begun
            done = step + 1
            if done == leg.steps or done % 50 == 0 or done == first + 5:
                left = leg.steps - done + sum(later.steps for later in legs[i + 1 :])
                step_s = spent_s / (done - first)
                logger.info(
                    f"step {done} of {leg.steps}  loss {loss:.4f}  {step_s:.2f} s/step  "
                    f"about {left * step_s / 3600:.1f} h left"
                )
            if done % save_steps == 0 and done < leg.steps:
                state |= {"leg": i, "step": done, "seconds": before_s + spent_s}
                save_state(folder, state, model, optimizer)
        # Round as the file does. Buffers are not rounded, because a resumed run recomputes them.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        seconds = round(before_s + time.monotonic() - begun)
        shares = accuracies(model, seed, leg.images, num_scored)
        found.append(
            asdict(leg)
            | {
                "seed": seed,
                "tasks": TASKS,
                "world": VERSION,
                "torch": torch.__version__,
                "seconds": seconds,
                "found": shares,
            }
        )
        logger.info(f"leg {i + 1} of {len(legs)}: {shares}")
        state |= {"leg": i + 1, "step": 0, "seconds": 0.0, "found": json.dumps(found)}
        save_state(folder, state, model)
    # A folder inside the unfinished run, next to the weights from which a resumed run starts.
    whole = folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    model.save(
        whole,
        torch.bfloat16,
        {"accuracy": json.dumps(found[-1]["found"]), "legs": json.dumps(found)},
    )
    whole.replace(out)
    shutil.rmtree(folder)
    return found[-1]["found"]


def vocabulary(seed: int) -> list[str]:
    """Return the texts on which the tokenizer is trained."""
    texts = [RECONSTRUCT, *CAPTION_PROMPTS]
    for i in range(2000):
        picture = scene(seed, i)
        texts.append(picture.caption)
        if len(picture.shapes) == 1:
            texts += edit(picture, seed, i)
    return texts


def train_step(
    model: Captioner,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    leg: Leg,
    *,
    seed: int,
    i: int,
    step: int,
) -> float:
    """Take one step of leg i and return its loss. The batch depends only on (seed, i, step)."""
    for group in optimizer.param_groups:
        group["lr"] = (
            leg.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / leg.steps))
        )
    tasks = [task for task, share in TASKS.items() for _ in range(round(leg.batch * share))]
    generator = torch.Generator().manual_seed(((seed * len(LEGS) + i) << 32) + step)
    numbers = torch.randint(0, 1 << 40, (len(tasks),), generator=generator).tolist()
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
        loss, _ = model(*examples.batch(tasks, numbers))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save_state(
    folder: Path, state: dict, model: Captioner, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write the state of an unfinished run atomically."""
    parts = {"model": model.internvl.state_dict()}
    if optimizer is not None:
        parts["optimizer"] = optimizer.state_dict()
    with whole_file(folder / STATE) as partial:
        torch.save(state | parts, partial)


def resume(folder: Path, settings: dict) -> dict | None:
    """Return the state of an unfinished run, or None if nothing was saved yet.

    Raises:
        InputError: if the run has other settings.
    """
    path = folder / STATE
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    if json.loads(state["settings"]) != settings:
        raise InputError(
            f"{folder} is an unfinished run with other settings: {state['settings']}. "
            "Remove it, or give another --out."
        )
    return state


def metadata(folder: str | Path) -> dict[str, str]:
    """Return the metadata in the header of a folder's weight file."""
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        return file.metadata()


@torch.no_grad()
def accuracies(
    model: Captioner, seed: int, start: int, num: int, batch: int = 100
) -> dict[str, float]:
    """Return {"caption, train": share of exact answers, ...} for every task and split.

    The "train" split has combinations of colour, shape and role that occur in training, the "test"
    split those that never do.

    Args:
        model: the captioner.
        seed: seed of the scenes.
        start: number of the first scene. Scenes from the number of training pictures on are new.
        num: scenes per split.
        batch: scenes per forward pass.
    """
    found = {}
    for split in ("train", "test"):
        examples = Examples(seed, start, num, split)
        for task in TASKS:
            parts = [range(first, min(first + batch, num)) for first in range(0, num, batch)]
            right = [model(*examples.batch([task] * len(part), part))[1] for part in parts]
            found[f"{task}, {split}"] = round(torch.cat(right).double().mean().item(), 4)
    return found


def main(argv: list[str] | None = None) -> int:
    """Train on the shipped schedule from the command line and return the exit code."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=arguments.path, required=True, help="folder to write; must not exist yet"
    )
    parser.add_argument("--seed", type=arguments.seed, default=0)
    try:
        args = parser.parse_args(argv)
    except InputError as error:
        print(f"iomm: {error}", file=sys.stderr)
        return 2
    steps = sum(leg.steps for leg in LEGS)
    hours = [steps * step_s / 3600 for step_s in STEP_S]
    print(
        f"{steps:,} steps in {len(LEGS)} legs: {hours[0]:.1f} to {hours[1]:.1f} hours on two "
        "cores. The same command resumes an interrupted run.",
        flush=True,
    )
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    try:
        print(train(args.out, seed=args.seed))
    except InputError as error:
        print(f"iomm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
