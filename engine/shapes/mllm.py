"""The tiny MLLM of the shapes world: InternVL's architecture at 1 / 1000 of its size, 32 px input, 16 image tokens, width 192.

It learns to understand and never to draw: picture -> caption, caption -> the same caption, picture and instruction -> caption
of the edited picture, of the world's "train" split only. model.mllm=shapes is the one in WEIGHTS; the head of its
model.safetensors says how exactly it answers and how it was made. To make another, and give it to a run as model.mllm=FOLDER:

    python -m iomm.engine.shapes.mllm --out FOLDER"""

import argparse
import io
import json
import math
import shutil
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from iomm.engine.shapes.world import VERSION, draw, edit, scene
from iomm.internvl import Captioner, create_mllm
from iomm.kernels.dispatch import cpu_has_bf16
from iomm.mllm import IMAGE_MEAN, IMAGE_STD, RECONSTRUCT

VISION = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, image_size=32, patch_size=4,
              attention_bias=True)
TEXT = dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, intermediate_size=512,
            max_position_embeddings=512)
ASKED = ("", RECONSTRUCT, "Describe the image.")       # what the user says beside a picture that is to be captioned
WEIGHTS = Path(__file__).parent / "weights"
TASKS = {"caption": 0.75, "read": 0.0625, "edit": 0.1875}   # shares of a batch: picture -> caption, caption -> caption, edits


class Examples:
    """(text, picture or None, answer) of `num` scenes of a split, from number `start` on; pictures as ViT pixels, kept as
    bytes. A picture goes through JPEG and the same cubic resize as those that are trained on."""

    def __init__(self, seed, start, num, split):
        side = VISION["image_size"]
        self.scenes = [scene(seed, i, split) for i in range(start, start + num)]
        self.pixels_NCHW = torch.stack([vit_bytes(draw(picture), side) for picture in self.scenes])
        self.seed, self.split = seed, split
        self.editable = [i for i, picture in enumerate(self.scenes) if len(picture.shapes) == 1]

    def batch(self, tasks, numbers):
        """A task and a number each, which chooses scene and wording -> (texts, answers, vit pixels (I, 3, side, side) of those
        with a picture, has_image) for Captioner."""
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
        return texts, answers, normalised(self.pixels_NCHW[shown]) if shown else None, [task != "read" for task in tasks]


def normalised(bytes_CHW):
    """uint8 (..., 3, H, W) -> as the ViT wants it."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    return (bytes_CHW / 255 - mean) / std


def vit_pixels(picture, side, size_px):
    """PIL image -> (3, side, side) as the loader of a run at size_px hands it to the ViT: JPEG, the VAE's crop, resized from
    that, normalised."""
    return normalised(resized(vit_bytes(picture, size_px), side))


def vit_bytes(picture, side):
    """PIL image -> (3, side, side) uint8, through JPEG."""
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=92, subsampling=0)
    pixels_HWC = torch.frombuffer(bytearray(Image.open(jpeg).convert("RGB").tobytes()), dtype=torch.uint8)
    image_1CHW = pixels_HWC.view(picture.height, picture.width, 3).permute(2, 0, 1)[None]
    return resized(image_1CHW[0], side)


def resized(bytes_CHW, side):
    return torch.nn.functional.interpolate(bytes_CHW[None], size=(side, side), mode="bicubic", antialias=True)[0]


def train(out, *, steps, batch, lr, num_images, seed, start=None, num_judged=2000, say=print):
    """Trains from scratch, or from the folder `start` on, and writes the folder `out`. Returns the accuracies, which stand in
    the metadata of its weights beside the settings of every leg."""
    folder, legs = Path(out), []
    shutil.rmtree(folder, ignore_errors=True)
    if start is None:
        words = [RECONSTRUCT, *ASKED, *(scene(seed, i).caption for i in range(2000))]
        words += [part for i in range(2000) if len((picture := scene(seed, i)).shapes) == 1 for part in edit(picture, seed, i)]
        create_mllm(folder, texts=words, vision=VISION, text=TEXT, seed=seed)
    else:
        shutil.copytree(start, folder)
        legs = json.loads(metadata(folder)["legs"])
    model = Captioner(folder)
    examples = Examples(seed, 0, num_images, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    random, begun, tasks = torch.Generator().manual_seed(seed + len(legs)), time.monotonic(), []
    for task, share in TASKS.items():
        tasks += [task] * round(batch * share)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        numbers = torch.randint(0, 1 << 40, (len(tasks),), generator=random).tolist()
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            loss, _ = model(*examples.batch(tasks, numbers))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            say(f"step {step}/{steps}  loss {loss.item():.4f}  {time.monotonic() - begun:.0f} s", flush=True)
    model.internvl.bfloat16().float()            # the rounding of the file, before it is judged
    found = accuracies(model, seed, num_images, num_judged)
    legs.append({"steps": steps, "batch": batch, "lr": lr, "images": num_images, "seed": seed, "tasks": TASKS, "world": VERSION,
                 "torch": torch.__version__, "seconds": round(time.monotonic() - begun), "found": found})
    model.save(folder, torch.bfloat16, {"accuracy": json.dumps(found), "legs": json.dumps(legs)})
    return found


def metadata(folder):
    """{name: text} in the head of a folder's weights."""
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        return file.metadata()


@torch.no_grad()
def accuracies(model, seed, start, num, batch=100):
    """{"caption, train": share answered exactly, ...}: pictures that were not trained on, of combinations of colour, shape
    and role that were ("train") and of those that never were ("test")."""
    found = {}
    for split in ("train", "test"):
        examples = Examples(seed, start, num, split)
        for task in TASKS:
            parts = [range(first, min(first + batch, num)) for first in range(0, num, batch)]
            right = [model(*examples.batch([task] * len(part), part))[1] for part in parts]
            found[f"{task}, {split}"] = round(torch.cat(right).double().mean().item(), 4)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--start", help="folder of weights to go on from; default: from scratch")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--num-images", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(train(args.out, steps=args.steps, batch=args.batch, lr=args.lr, num_images=args.num_images, seed=args.seed,
                start=args.start))
