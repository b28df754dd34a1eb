"""The tiny MLLM of the shapes world: InternVL's architecture at 1 / 1000 of its size, 32 px input, 16 image tokens, width 192.

It learns to understand and never to draw: picture -> caption, caption -> the same caption, picture and instruction -> caption
of the edited picture, of the world's "train" split only. model.mllm=shapes is the one in WEIGHTS; the head of its
model.safetensors says how exactly it answers and how it was made. To train another from scratch by the schedule in LEGS, and
give it to a run as model.mllm=FOLDER (a killed command resumes when it is started again):

    python -m iomm.engine.shapes.mllm --out FOLDER
"""

import argparse
import io
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from iomm.config import InputError
from iomm.engine.data.atomic import whole_file
from iomm.engine.shapes.dataset import VERSION, draw, edit, scene
from iomm.internvl import byte_tokenizer, internvl_config
from iomm.kernels.dispatch import cpu_has_bf16
from iomm.mllm import IMAGE, IMAGE_MEAN, IMAGE_STD, RECONSTRUCT, TURN

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
# What the user says beside a picture that is to be captioned.
ASKED = ("", RECONSTRUCT, "Describe the image.")
WEIGHTS = Path(__file__).parent / "weights"
# Shares of a batch: picture -> caption, caption -> caption, edits.
TASKS = {"caption": 0.75, "read": 0.0625, "edit": 0.1875}
# Of an unfinished run: weights, moments, where it is.
STATE = "state.pt"
# Seconds a step took on two cores with bf16, and on two with AVX2 alone.
STEP_S = 0.3, 1.3


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A part of the schedule: a warm-up of 100 steps, then a cosine that ends at 0."""

    steps: int
    batch: int
    lr: float
    # Of the dataset, 3 wordings each.
    images: int


# Measured after each leg on one and the other machine: 95.6, 98.8 and 99.4 % of new captions exactly right.
LEGS = (
    Leg(steps=5000, batch=64, lr=1e-3, images=16_000),
    Leg(steps=3000, batch=64, lr=7e-4, images=64_000),
    Leg(steps=3000, batch=64, lr=5e-4, images=64_000),
)


def create_mllm(folder, *, texts, vision, text, seed=0, vocab_size=512):
    """Writes a new InternVL with random weights to `folder`, in transformers' own format, and returns the folder.

    vision, text: keyword arguments of InternVLVisionConfig and of the decoder's config (Qwen2Config unless model_type
    says qwen3). texts: strings on which a byte-level BPE vocabulary of at most vocab_size tokens is trained, so that any
    other text still has an encoding. Weights are drawn on the CPU from `seed`.
    """
    from transformers import InternVLForConditionalGeneration
    from transformers.utils import logging

    tokenizer = byte_tokenizer(texts, vocab_size)
    config = internvl_config(
        vision,
        {**text, "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Captioner(nn.Module):
    """An InternVL with its language-model head, to be trained on turns [user: text, image] -> [assistant: answer].

    `folder` is one that create_mllm or save wrote. forward(texts, answers, vit_pixels_ICHW, has_image) -> (mean loss of the
    answers' tokens, (B,) bool: whether the most probable tokens are exactly the answer; greedy decoding gives it then).
    """

    def __init__(self, folder):
        from transformers import AutoTokenizer, InternVLForConditionalGeneration

        super().__init__()
        self.internvl = InternVLForConditionalGeneration.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def forward(self, texts, answers, vit_pixels_ICHW, has_image):
        config = self.internvl.config
        rows = []
        for text, answer, image in zip(texts, answers, has_image, strict=True):
            middle = (
                IMAGE[0] + "<IMG_CONTEXT>" * config.image_seq_length + IMAGE[1] if image else ""
            )
            asked, said = (
                self.tokenizer(part, add_special_tokens=False)["input_ids"]
                for part in (TURN[0] + text + middle + TURN[1], answer + "<|im_end|>")
            )
            rows.append((torch.tensor(asked + said), torch.tensor([-100] * len(asked) + said)))
        ids_BT, labels_BT = (
            torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding)
            for column, padding in zip(zip(*rows), (self.tokenizer.pad_token_id, -100))
        )
        shown_BT = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(row), dtype=torch.long) for row, _ in rows], batch_first=True
        )
        logits_BTV = self.internvl(
            input_ids=ids_BT, attention_mask=shown_BT, pixel_values=vit_pixels_ICHW, use_cache=False
        ).logits[:, :-1]
        labels_BT = labels_BT[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=-100
        )
        right_BT = (logits_BTV.argmax(-1) == labels_BT) | (labels_BT == -100)
        return loss, right_BT.all(1)

    def save(self, folder, dtype, metadata):
        """Writes weights of `dtype`, config and tokenizer in transformers' own format; metadata: strings that stand in the
        head of model.safetensors.
        """
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        self.internvl.to(dtype).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = {**file.metadata(), **metadata}
        save_file(load_file(path), path, metadata=metadata)


class Examples:
    """(text, picture or None, answer) of `num` scenes of a split, from number `start` on; pictures as ViT pixels, kept as
    bytes. A picture goes through JPEG and the same cubic resize as those that are trained on.
    """

    def __init__(self, seed, start, num, split):
        side = VISION["image_size"]
        self.scenes = [scene(seed, i, split) for i in range(start, start + num)]
        self.pixels_NCHW = torch.stack([vit_bytes(draw(picture), side) for picture in self.scenes])
        self.seed, self.split = seed, split
        self.editable = [i for i, picture in enumerate(self.scenes) if len(picture.shapes) == 1]

    def batch(self, tasks, numbers):
        """A task and a number each, which chooses scene and wording -> (texts, answers, vit pixels (I, 3, side, side) of those
        with a picture, has_image) for Captioner.
        """
        texts, answers, shown = [], [], []
        for task, n in zip(tasks, numbers, strict=True):
            if task == "edit":
                i = self.editable[n % len(self.editable)]
                text, answer = edit(self.scenes[i], self.seed, n, self.split)
            else:
                i = n % len(self.scenes)
                answer = self.scenes[i].caption
                text = answer if task == "read" else ASKED[n // len(self.scenes) % len(ASKED)]
            texts.append(text)
            answers.append(answer)
            shown += [i] if task != "read" else []
        return (
            texts,
            answers,
            normalised(self.pixels_NCHW[shown]) if shown else None,
            [task != "read" for task in tasks],
        )


def normalised(bytes_CHW):
    """uint8 (..., 3, H, W) -> as the ViT wants it."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    return (bytes_CHW / 255 - mean) / std


def vit_pixels(picture, side, size_px):
    """PIL image -> (3, side, side) as the loader of a run at size_px hands it to the ViT: JPEG, the VAE's crop, resized from
    that, normalised.
    """
    return normalised(resized(vit_bytes(picture, size_px), side))


def vit_bytes(picture, side):
    """PIL image -> (3, side, side) uint8, through JPEG."""
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=92, subsampling=0)
    pixels_HWC = torch.frombuffer(
        bytearray(Image.open(jpeg).convert("RGB").tobytes()), dtype=torch.uint8
    )
    image_1CHW = pixels_HWC.view(picture.height, picture.width, 3).permute(2, 0, 1)[None]
    return resized(image_1CHW[0], side)


def resized(bytes_CHW, side):
    return torch.nn.functional.interpolate(
        bytes_CHW[None], size=(side, side), mode="bicubic", antialias=True
    )[0]


def train(
    out: str | Path,
    *,
    legs: tuple[Leg, ...] = LEGS,
    seed: int = 0,
    num_judged: int = 2000,
    save_steps: int = 250,
    say=print,
) -> dict[str, float]:
    """Train the MLLM from scratch, write the folder `out`, and return the accuracies of the last leg.

    Each leg has an AdamW of its own; after it the weights are rounded to bf16, as in the file, and
    evaluated. The state of an unfinished run is written to `out`.unfinished every save_steps steps: a
    killed run that is started again with the same legs and seed resumes there and ends with the same
    weights. The metadata of the weights hold the accuracies and the settings of every leg.

    Args:
        num_judged: pictures of each split on which the accuracies are measured.
        say: called with each line of progress.

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
        say(f"leg {i + 1} of {len(legs)}: {leg}, from step {first}")
        examples = Examples(seed, 0, leg.images, "train")
        begun = time.monotonic()
        for step in range(first, leg.steps):
            loss = train_step(model, optimizer, examples, leg, seed=seed, i=i, step=step)
            spent_s = time.monotonic() - begun
            done = step + 1
            if done == leg.steps or done % 50 == 0 or done == first + 5:
                left = leg.steps - done + sum(later.steps for later in legs[i + 1 :])
                say(
                    f"step {done} of {leg.steps}  loss {loss:.4f}  {spent_s / (done - first):.2f} s a step  "
                    f"about {left * spent_s / (done - first) / 3600:.1f} h left"
                )
            if done % save_steps == 0 and done < leg.steps:
                state |= {"leg": i, "step": done, "seconds": before_s + spent_s}
                save_state(folder, state, model, optimizer)
        # As in the file; not the buffers, which a resumed run computes anew.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        seconds = round(before_s + time.monotonic() - begun)
        shares = accuracies(model, seed, leg.images, num_judged)
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
        say(f"leg {i + 1} of {len(legs)}: {shares}")
        state |= {"leg": i + 1, "step": 0, "seconds": 0.0, "found": json.dumps(found)}
        save_state(folder, state, model)
    # Beside the weights that a resumed run starts from.
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
    texts = [RECONSTRUCT, *ASKED]
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
    """Take one step of leg i and return its loss. The batch depends on (seed, i, step) alone."""
    for group in optimizer.param_groups:
        group["lr"] = (
            leg.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / leg.steps))
        )
    tasks = [task for task, share in TASKS.items() for _ in range(round(leg.batch * share))]
    random = torch.Generator().manual_seed(((seed * len(LEGS) + i) << 32) + step)
    numbers = torch.randint(0, 1 << 40, (len(tasks),), generator=random).tolist()
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
        loss, _ = model(*examples.batch(tasks, numbers))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save_state(
    folder: Path, state: dict, model: Captioner, optimizer: torch.optim.Optimizer | None = None
):
    """Write the state of an unfinished run, whole or not at all."""
    parts = {"model": model.internvl.state_dict()}
    if optimizer is not None:
        parts["optimizer"] = optimizer.state_dict()
    with whole_file(folder / STATE) as partial:
        torch.save(state | parts, partial)


def resume(folder: Path, settings: dict) -> dict | None:
    """Return the state of an unfinished run with these settings, or None if there is none yet."""
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


def metadata(folder):
    """{name: text} in the head of a folder's weights."""
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        return file.metadata()


@torch.no_grad()
def accuracies(model, seed, start, num, batch=100):
    """{"caption, train": share answered exactly, ...}: pictures that were not trained on, of combinations of colour, shape
    and role that were ("train") and of those that never were ("test").
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
    """Train the shipped schedule from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder to write; must not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    steps = sum(leg.steps for leg in LEGS)
    print(
        f"{steps:,} steps in {len(LEGS)} legs: {steps * STEP_S[0] / 3600:.1f} to {steps * STEP_S[1] / 3600:.1f} hours "
        "on two cores; started again with the same --out, the command resumes",
        flush=True,
    )
    try:
        print(train(args.out, seed=args.seed, say=lambda line: print(line, flush=True)))
    except InputError as error:
        print(f"iomm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
