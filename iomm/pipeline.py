"""From text, or an image and an instruction, to pictures: trained parts, MLLM, VAE and sampler together."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from iomm.adapter import Connector, QueryAdapter
from iomm.config import AdapterConfig, InputError
from iomm.internvl import load_mllm
from iomm.kernels.noisy_tokens import unpatch
from iomm.model import IOMM, Recipe
from iomm.sampler import image_noise, sample
from iomm.vae import load_vae
from iomm.weights import export_generator, load_generator, load_module, read_json, save_module

# What an exported folder says beside diffusers' config.json.
CARD = "iomm.json"


class Pipeline:
    """Draws pictures. Pipeline.from_pretrained(folder)(prompt) -> list of PIL images; edit(image, instruction) too."""

    def __init__(self, model, size_px, *, batch=16, origin=None):
        """model: an IOMM, not sharded. size_px: default side of a picture. batch: pictures drawn at once. origin: where the
        weights are from, as {word: text}; kept in an exported folder.
        """
        self.model, self.size_px, self.batch, self.origin = (
            model,
            size_px,
            batch,
            dict(origin or {}),
        )

    @classmethod
    def from_pretrained(cls, folder, *, device=None, dtype=None, mllm=None, vae=None):
        """A folder of save_pretrained. mllm, vae: other places than the folder names. Never downloads unless one of
        them is a hub id; never unpickles. dtype: bfloat16 on a GPU, float32 on a CPU. Raises InputError.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        folder = Path(folder)
        card = read_json(folder / CARD)
        try:
            config, size_px = AdapterConfig(**card["adapter"]), int(card["size_px"])
            mllm_name, vae_name, revision = (
                mllm or card["mllm"],
                vae or card["vae"],
                card["mllm_revision"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / CARD} is not an IOMM card: {error}") from error
        frozen = (
            load_mllm(mllm_name, revision=None if mllm else revision, dtype=dtype, device=device),
            load_vae(vae_name, patch=card.get("patch", 2), dtype=dtype, device=device),
        )
        generator = load_generator(folder, device=device, dtype=dtype)
        wanted = (frozen[1].token_dim, frozen[0].width)
        if (generator.config.token_dim, generator.config.condition_dim) != wanted:
            raise InputError(
                f"{folder} was trained with latent tokens of {generator.config.token_dim} and an MLLM of width "
                f"{generator.config.condition_dim}; {vae_name} and {mllm_name} have {wanted[0]} and {wanted[1]}"
            )
        adapter = connector = None
        if config.kind != "none":
            adapter = QueryAdapter(config, frozen[0].width).to(device, dtype)
            load_module(adapter, folder / "adapter.safetensors")
        if config.connector_layers:
            connector = Connector(config, frozen[0].width).to(device, dtype)
            load_module(connector, folder / "connector.safetensors")
        return cls(
            IOMM(generator, adapter, *frozen, Recipe(adapter=config), connector),
            size_px,
            origin=card.get("origin"),
        )

    def compile(self):
        """Every block of generator, MLLM and ViT becomes a graph of torch.compile; the first batch of a shape waits for
        it. Call once; returns the pipeline.
        """
        self.model.prepare_blocks(compiled=True)
        return self

    def save_pretrained(self, folder, *, mllm, vae, mllm_revision=None, dtype=None):
        """Writes the generator as a diffusers folder, adapter and connector beside it, and which MLLM and VAE they need.

        Returns the folder. dtype: of the files, the weights' own by default.
        """
        folder, model = Path(folder), self.model
        export_generator(model.generator, folder, patch=model.frozen[1].patch, dtype=dtype)
        for name in ("adapter", "connector"):
            if getattr(model, name) is not None:
                save_module(getattr(model, name), folder / f"{name}.safetensors", dtype=dtype)
        card = {
            "adapter": asdict(model.recipe.adapter),
            "size_px": self.size_px,
            "mllm": str(mllm),
            "mllm_revision": mllm_revision,
            "vae": str(vae),
            "patch": model.frozen[1].patch,
            "origin": self.origin,
        }
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        return folder

    def __call__(
        self,
        prompt,
        *,
        steps=20,
        guidance=4.0,
        seed=0,
        size=None,
        numbers=None,
        method="euler",
        shift=1.0,
    ):
        """Prompt or list of prompts -> as many PIL images. "" draws without a prompt.

        size: side in pixels, or (height, width), multiples of the VAE's factor x patch. numbers: int64 number of each image,
        default 0, 1, 2 ...; seed and number alone decide an image's noise, in whatever list it stands. guidance above 1
        needs a model that has seen empty prompts (stage 2). The MLLM reads each text of a batch once. Raises InputError (a
        ValueError).
        """
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise InputError(f"prompt must be a text or a list of texts, got {prompt!r}")
        return self._draw(
            prompts,
            None,
            numbers,
            steps=steps,
            guidance=guidance,
            seed=seed,
            size=size,
            method=method,
            shift=shift,
        )

    def edit(
        self,
        image,
        instruction,
        *,
        steps=20,
        guidance=4.0,
        seed=0,
        size=None,
        numbers=None,
        method="euler",
        shift=1.0,
    ):
        """RGB PIL image and instruction -> PIL image; lists of both -> list. The condition is the instruction and all tokens
        of the image, of which the MLLM sees the central square. The rest is as in a call.
        """
        many = isinstance(instruction, list | tuple)
        images, texts = (list(image), list(instruction)) if many else ([image], [instruction])
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"instruction must be a text, got {instruction!r}")
        if len(images) != len(texts):
            raise InputError(
                f"edit wants an image for each instruction, got {len(images)} and {len(texts)}"
            )
        edited = self._draw(
            texts,
            images,
            numbers,
            steps=steps,
            guidance=guidance,
            seed=seed,
            size=size,
            method=method,
            shift=shift,
        )
        return edited if many else edited[0]

    def _vit_pixels(self, image):
        if getattr(image, "mode", None) != "RGB":
            raise InputError(
                f"image must be a PIL image in mode RGB, got {getattr(image, 'mode', type(image).__name__)}: "
                'use image.convert("RGB")'
            )
        side, px = min(image.size), self.model.frozen[0].vit_px
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.resize(
            (px, px), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
        return torch.from_numpy(np.array(square))[None].to(self.model.generator.final.weight.device)

    def _draw(self, texts, pictures, numbers, *, size, **settings):
        mllm, device, images = self.model.frozen[0], self.model.generator.final.weight.device, []
        number_B = (
            torch.arange(len(texts))
            if numbers is None
            else torch.tensor(numbers, dtype=torch.int64)
        )
        if len(number_B) != len(texts):
            raise InputError(
                f"numbers must be one for each image, got {len(number_B)} for {len(texts)}"
            )
        for start in range(0, len(texts), self.batch):
            part = slice(start, start + self.batch)
            read, row_B, tokens_IPD = texts[part], None, None
            if pictures is None:
                read = list(dict.fromkeys(texts[part]))
                row_B = torch.tensor([read.index(text) for text in texts[part]], device=device)
            else:
                tokens_IPD = mllm.image_tokens(
                    torch.cat([self._vit_pixels(picture) for picture in pictures[part]])
                )
            pixels = sample_pixels(
                self.model,
                mllm.condition(read, tokens_IPD),
                number_B[part].to(device),
                row_B=row_B,
                size_px=size or self.size_px,
                **settings,
            )
            images += to_images(pixels)
        return images


@torch.no_grad()
def sample_pixels(
    model,
    condition,
    image_B,
    *,
    size_px,
    row_B=None,
    steps=20,
    guidance=1.0,
    seed=0,
    method="euler",
    shift=1.0,
):
    """Condition (packed) -> pixels (B, 3, H, W) in [-1, 1], float32; size_px is their side, or (height, width).

    image_B: int64 numbers of the images; image i of a seed has the same noise in whatever batch it is drawn. row_B: the
    sample of the condition that each image is drawn from, default its own. The MLLM reads every sample and the empty prompt
    once, before the first step. guidance above 1 needs a model that has seen empty prompts (stage 2).
    """
    mllm, vae = model.frozen
    rows, columns = grid = vae.grid(*height_width(size_px))
    read_BCD, lengths_B = model.encode_condition(condition)
    if row_B is not None:
        read_BCD, lengths_B = read_BCD[row_B], None if lengths_B is None else lengths_B[row_B]
    empty_BCD = None
    if guidance != 1.0:
        empty_1CD, _ = model.encode_condition(mllm.condition([""]))
        # conditions "all": as long as the prompt
        if lengths_B is not None or empty_1CD.shape[1] != read_BCD.shape[1]:
            own_B = (
                torch.full((len(read_BCD),), read_BCD.shape[1], device=read_BCD.device)
                if lengths_B is None
                else lengths_B
            )
            lengths_B = torch.cat((own_B, torch.full_like(own_B, empty_1CD.shape[1])))
            longest = max(read_BCD.shape[1], empty_1CD.shape[1])
            read_BCD, empty_1CD = (
                F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (read_BCD, empty_1CD)
            )
        empty_BCD = empty_1CD.expand_as(read_BCD)
    noise_BNK = image_noise(seed, image_B, rows * columns, vae.token_dim)

    def velocity(x_BNK, t_B, condition_BCD):
        return model.velocity(x_BNK, t_B, condition_BCD, lengths_B, grid)

    tokens_BNK = sample(
        velocity,
        noise_BNK,
        read_BCD,
        empty_BCD,
        steps=steps,
        method=method,
        guidance=guidance,
        shift=shift,
    )
    return vae.decode(unpatch(tokens_BNK, rows * vae.patch, columns * vae.patch, vae.patch)).float()


def height_width(size_px):
    """Side of a square, or (height, width) -> (height, width)."""
    return tuple(size_px) if isinstance(size_px, list | tuple) else (size_px, size_px)


def to_images(pixels_BCHW):
    """Pixels (B, 3, H, W) in [-1, 1] -> list of PIL images."""
    array = (
        ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )
    return [Image.fromarray(np.ascontiguousarray(a)) for a in array]


def image_grid(images, columns, pad_px=2):
    """Images of one size -> one image, row by row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + pad_px) - pad_px, rows * (height + pad_px) - pad_px), "white"
    )
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + pad_px), (i // columns) * (height + pad_px)))
    return sheet
