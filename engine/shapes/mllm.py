"""The tiny MLLM of the shapes world: InternVL's architecture at 1 / 1000 of its size, which understands that world.

Its weights come with the package (engine/shapes/weights, bf16). How they were made, on two cores in about a quarter of an hour:

    python -m iomm.engine.shapes.mllm --out engine/shapes/weights

It is trained to understand and never to draw: picture -> caption, caption -> the same caption, and picture and instruction ->
caption of the edited picture. It sees pictures and captions of the world's "train" split only, like the generator. The
accuracies of the rounded weights stand in the head of weights/model.safetensors."""

import argparse
import io
import math
import shutil
import time
from pathlib import Path

import torch
from PIL import Image

from iomm.engine.shapes.world import draw, edit, scene
from iomm.mllm import IMAGE_MEAN, IMAGE_STD, RECONSTRUCT, Captioner, create_mllm

VISION = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, image_size=32, patch_size=4,
              attention_bias=True)
TEXT = dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, intermediate_size=512,
            max_position_embeddings=512)
WEIGHTS = Path(__file__).parent / "weights"
ASKED = ("", RECONSTRUCT, "Describe the image.")       # what the user says beside a picture that is to be captioned
TASKS = {"caption": 0.5, "read": 0.25, "edit": 0.25}   # shares of a batch: picture -> caption, caption -> caption, edits


def tiny_mllm(folder):
    """Folder -> the same folder, holding the tiny MLLM in transformers' own format; copied there only if it is missing.

    32 px input, 16 image tokens, width 192."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(WEIGHTS, partial)
        partial.rename(folder)
    return folder


class Examples:
    """(text, picture or None, answer) of `num` scenes of a split, from number `start` on; pictures as ViT pixels, kept as
    bytes. A picture goes through JPEG and the same cubic resize as those that are trained on."""

    def __init__(self, seed, start, num, split):
        side = VISION["image_size"]
        self.scenes = [scene(seed, i, split) for i in range(start, start + num)]
        self.pixels_NCHW = torch.stack([vit_bytes(draw(picture), side) for picture in self.scenes])
        self.seed, self.split = seed, split
        self.editable = [i for i, picture in enumerate(self.scenes) if len(picture.shapes) == 1]

    def batch(self, task, numbers):
        """-> (texts, answers, vit pixels (I, 3, side, side), has_image) for Captioner; `numbers` choose scene and wording."""
        texts, answers, chosen = [], [], []
        for n in numbers:
            if task == "edit":
                i = self.editable[n % len(self.editable)]
                text, answer = edit(self.scenes[i], self.seed, n, self.split)
            else:
                i = n % len(self.scenes)
                answer = self.scenes[i].caption
                text = answer if task == "read" else ASKED[n // len(self.scenes) % len(ASKED)]
            texts.append(text)
            answers.append(answer)
            chosen.append(i)
        if task == "read":
            return texts, answers, None, [False] * len(texts)
        return texts, answers, normalised(self.pixels_NCHW[chosen]), [True] * len(texts)


def normalised(bytes_CHW):
    """uint8 (..., 3, H, W) -> as the ViT wants it."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
    return (bytes_CHW / 255 - mean) / std


def vit_pixels(picture, side):
    """PIL image -> (3, side, side) as the loader hands it to the ViT: through JPEG, resized, normalised."""
    return normalised(vit_bytes(picture, side))


def vit_bytes(picture, side):
    """PIL image -> (3, side, side) uint8 as the loader would hand it to the ViT."""
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=92, subsampling=0)
    pixels_HWC = torch.frombuffer(bytearray(Image.open(jpeg).convert("RGB").tobytes()), dtype=torch.uint8)
    image_1CHW = pixels_HWC.view(picture.height, picture.width, 3).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(image_1CHW, size=(side, side), mode="bicubic", antialias=True)[0]


def train(out, *, steps, batch, lr, num_images, seed, say=print):
    """Trains from scratch and writes the folder `out`. Returns the accuracies, as they stand in its metadata."""
    folder = Path(out)
    shutil.rmtree(folder, ignore_errors=True)
    words = [RECONSTRUCT, *ASKED, *(scene(seed, i).caption for i in range(2000))]
    words += [part for i in range(2000) if len((picture := scene(seed, i)).shapes) == 1 for part in edit(picture, seed, i)]
    create_mllm(folder, texts=words, vision=VISION, text=TEXT, seed=seed)
    model = Captioner(folder)
    examples = Examples(seed, 0, num_images, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    random, begun = torch.Generator().manual_seed(seed), time.monotonic()
    for step in range(steps):
        rate = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for task, share in TASKS.items():
            numbers = torch.randint(0, 1 << 40, (round(batch * share),), generator=random).tolist()
            loss, _ = model(*examples.batch(task, numbers))
            (share * loss).backward()
            total += share * loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            say(f"step {step}/{steps}  loss {total:.4f}  {time.monotonic() - begun:.0f} s", flush=True)
    model.internvl.bfloat16().float()            # the rounding of the file, before it is judged
    found = accuracies(model, seed, num_images)
    facts = {"steps": steps, "batch": batch, "lr": lr, "images": num_images, "seed": seed, "torch": torch.__version__,
             "command": "python -m iomm.engine.shapes.mllm --out engine/shapes/weights", **found}
    model.save(folder, torch.bfloat16, {key: str(value) for key, value in facts.items()})
    return found


@torch.no_grad()
def accuracies(model, seed, start, num=2000):
    """{"caption, train": share answered exactly, ...}: pictures that were not trained on, of combinations of colour, shape
    and role that were ("train") and of those that never were ("test")."""
    found = {}
    for split in ("train", "test"):
        examples = Examples(seed, start, num, split)
        for task in TASKS:
            right = [model(*examples.batch(task, range(first, min(first + 100, num))))[1] for first in range(0, num, 100)]
            found[f"{task}, {split}"] = round(torch.cat(right).double().mean().item(), 4)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--num-images", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(train(args.out, steps=args.steps, batch=args.batch, lr=args.lr, num_images=args.num_images, seed=args.seed))
