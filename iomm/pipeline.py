"""Text to images, and image editing: trained modules, MLLM, VAE and sampler together."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from iomm import lora
from iomm.adapter import Connector, QueryAdapter
from iomm.config import AdapterConfig, InputError, PromptConfig
from iomm.internvl import load_mllm
from iomm.kernels.noisy_tokens import unpatch
from iomm.mllm import Condition
from iomm.model import IOMM, Recipe
from iomm.sampler import image_noise, sample
from iomm.vae import load_vae
from iomm.weights import export_generator, load_generator, load_module, read_json, save_module

# File in an exported folder with everything that diffusers' config.json does not record.
CARD = "iomm.json"

# Side of a square in pixels, or (height, width).
Size = int | Sequence[int]


class Pipeline:
    """Generates and edits images.

    `Pipeline.from_pretrained(folder)(prompt)` returns a list of PIL images, `edit(image,
    instruction)` an edited image.
    """

    def __init__(
        self,
        model: IOMM,
        size_px: int,
        *,
        batch: int = 16,
        origin: dict[str, str] | None = None,
    ):
        """Wrap a model.

        Args:
            model: an IOMM that is not sharded.
            size_px: default side of an image in pixels.
            batch: number of images sampled at once.
            origin: where the weights come from, as {word: text}; kept in an exported folder.
        """
        self.model = model
        self.size_px = size_px
        self.batch = batch
        self.origin = dict(origin or {})

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        mllm: Path | str | None = None,
        vae: Path | str | None = None,
    ) -> Self:
        """Load a folder written by `save_pretrained`.

        Nothing is unpickled. Nothing is downloaded unless the MLLM or the VAE is a hub id.

        Args:
            folder: the exported folder.
            device: defaults to the GPU if there is one.
            dtype: defaults to bfloat16 on a GPU and float32 on a CPU.
            mllm: MLLM to use instead of the one that the folder names.
            vae: VAE to use instead of the one that the folder names.

        Raises:
            InputError: if a file is missing or damaged, MLLM or VAE do not fit the generator, or
                the folder does not say where they are.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        folder = Path(folder)
        card = read_json(folder / CARD)
        try:
            config, size_px = AdapterConfig(**card["adapter"]), int(card["size_px"])
            prompt = PromptConfig(**card.get("prompt", {}))
            names = [
                str(given) if given else frozen_name(card, key, folder)
                for key, given in (("mllm", mllm), ("vae", vae))
            ]
            mllm_name, vae_name = map(shipped, names, ("mllm", "vae"))
            revision = card["mllm_revision"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / CARD} is not an IOMM card: {error}") from error
        frozen = (
            load_mllm(mllm_name, revision=None if mllm else revision, dtype=dtype, device=device),
            load_vae(vae_name, patch=card.get("patch", 2), dtype=dtype, device=device),
        )
        generator = load_generator(folder, device=device, dtype=dtype)
        trained = (generator.config.token_dim, generator.config.condition_dim)
        given = (frozen[1].token_dim, frozen[0].width)
        if trained != given:
            raise InputError(
                f"{folder} was trained with latent tokens of {trained[0]} and an MLLM of width "
                f"{trained[1]}, but {vae_name} and {mllm_name} have {given[0]} and {given[1]}. "
                "Use the VAE and the MLLM of the training run."
            )
        adapter = connector = None
        if config.kind != "none":
            adapter = QueryAdapter(config, frozen[0].width).to(device, dtype)
            load_module(adapter, folder / "adapter.safetensors")
        if config.connector_layers:
            connector = Connector(config, frozen[0].width).to(device, dtype)
            load_module(connector, folder / "connector.safetensors")
        model = IOMM(generator, adapter, *frozen, Recipe(adapter=config, prompt=prompt), connector)
        return cls(model, size_px, origin=card.get("origin"))

    def compile(self) -> Self:
        """Compile every block of generator, MLLM and ViT with torch.compile.

        Call once; returns the pipeline. The first batch of each shape waits for compilation.
        """
        self.model.prepare_blocks(compiled=True)
        return self

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        mllm: Path | str,
        vae: Path | str,
        mllm_revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Export the model as a diffusers folder that also contains adapter and connector.

        LoRA is merged into the weights.

        Args:
            folder: folder to write.
            mllm: folder or hub id of the MLLM that the model needs, or "shapes". Only the last part
                of a folder's name is recorded, since the path means nothing on another machine.
            vae: folder or hub id of the VAE that the model needs, or "shapes".
            mllm_revision: commit of the MLLM's hub checkpoint.
            dtype: dtype of the files. Defaults to that of the weights.

        Returns:
            The folder.
        """
        folder, model = Path(folder), self.model
        patch = model.frozen[1].patch
        if model.recipe.lora.rank:
            with lora.merged(model.generator) as state:
                export_generator(model.generator, folder, patch=patch, state=state, dtype=dtype)
        else:
            export_generator(model.generator, folder, patch=patch, dtype=dtype)
        for name in ("adapter", "connector"):
            if getattr(model, name) is not None:
                save_module(getattr(model, name), folder / f"{name}.safetensors", dtype=dtype)
        card = {
            "adapter": asdict(model.recipe.adapter),
            "prompt": asdict(model.recipe.prompt),
            "size_px": self.size_px,
            "mllm_revision": mllm_revision,
            "patch": patch,
            "origin": self.portable_origin(),
        }
        for key, name in (("mllm", str(mllm)), ("vae", str(vae))):
            local = name != "shapes" and Path(name).is_dir()
            card[key] = None if local else name
            if local:
                card[f"{key}_folder"] = Path(name).resolve().name
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        return folder

    def portable_origin(self) -> dict[str, Any]:
        """Return where the weights come from, with folders by their last name only.

        A path means nothing on another machine.
        """
        return {
            key: Path(value).name if key in ("run", "base") else value
            for key, value in self.origin.items()
        }

    def save_lora(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> Path:
        """Write only the LoRA, for load_lora_weights of diffusers' pipelines and for ComfyUI.

        Args:
            folder: folder of the file.
            dtype: dtype of the file. Defaults to that of the weights.

        Returns:
            The file, `lora.FILE` in the folder.
        """
        patch = self.model.frozen[1].patch
        return lora.save_lora(
            self.model.generator, folder, patch=patch, origin=self.portable_origin(), dtype=dtype
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int = 20,
        guidance: float = 4.0,
        seed: int = 0,
        size: Size | None = None,
        numbers: Sequence[int] | None = None,
        method: str = "euler",
        shift: float | str = 1.0,
    ) -> list[Image.Image]:
        """Generate one image for each prompt. The MLLM reads each distinct text of a batch once.

        Args:
            prompt: a prompt or a list of prompts. "" generates an image without a prompt.
            steps: sampler steps.
            guidance: weight of classifier-free guidance. Above 1 it needs a model trained with
                empty prompts (stage 2).
            seed: seed of the noise.
            size: side in pixels, or (height, width); multiples of the VAE's factor x patch.
            numbers: int64 number of each image, by default 0, 1, 2 ... The noise of an image
                depends only on seed and number, not on its position in the list.
            method: "euler" or "heun".
            shift: resolution shift of the times, or "flux" (`sampler.sample`).

        Raises:
            InputError: (a ValueError) if an argument is invalid.
        """
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise InputError(f"prompt must be a text or a list of texts, got {prompt!r}")
        return self._sample(
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
        image: Image.Image | Sequence[Image.Image],
        instruction: str | Sequence[str],
        *,
        steps: int = 20,
        guidance: float = 4.0,
        seed: int = 0,
        size: Size | None = None,
        numbers: Sequence[int] | None = None,
        method: str = "euler",
        shift: float | str = 1.0,
    ) -> Image.Image | list[Image.Image]:
        """Edit an image by an instruction, or a list of images by a list of instructions.

        The condition is the instruction and all tokens of the image, of which the MLLM sees the
        central square. All other arguments are as in `__call__`.

        Args:
            image: RGB PIL image, or a list of them.
            instruction: instruction, or a list with one for each image.
            steps: sampler steps.
            guidance: weight of classifier-free guidance.
            seed: seed of the noise.
            size: side of the result in pixels, or (height, width).
            numbers: int64 number of each image.
            method: "euler" or "heun".
            shift: resolution shift of the times, or "flux".

        Raises:
            InputError: (a ValueError) if an argument is invalid.
        """
        many = isinstance(instruction, list | tuple)
        images, texts = (list(image), list(instruction)) if many else ([image], [instruction])
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"instruction must be a text or a list of texts, got {instruction!r}")
        if len(images) != len(texts):
            raise InputError(
                "edit needs an image for each instruction, "
                f"got {len(images)} images and {len(texts)} instructions"
            )
        edited = self._sample(
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

    def _vit_pixels(self, image: Image.Image) -> Tensor:
        """Return the central square of an image as uint8 ViT pixels (1, vit_px, vit_px, 3)."""
        if getattr(image, "mode", None) != "RGB":
            raise InputError(
                "image must be a PIL image in mode RGB, "
                f'got {getattr(image, "mode", type(image).__name__)}. Use image.convert("RGB").'
            )
        side, px = min(image.size), self.model.frozen[0].vit_px
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.resize(
            (px, px), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
        return torch.from_numpy(np.array(square))[None].to(self.model.generator.final.weight.device)

    def _sample(
        self,
        texts: list[str],
        sources: list[Image.Image] | None,
        numbers: Sequence[int] | None,
        *,
        size: Size | None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Sample one image for each text, in batches. `sources` are the images to edit."""
        mllm, device = self.model.frozen[0], self.model.generator.final.weight.device
        number_B = (
            torch.arange(len(texts))
            if numbers is None
            else torch.tensor(numbers, dtype=torch.int64)
        )
        if len(number_B) != len(texts):
            raise InputError(
                f"numbers must have one entry for each image, got {len(number_B)} for {len(texts)}"
            )
        images = []
        for start in range(0, len(texts), self.batch):
            part = slice(start, start + self.batch)
            # The texts that the MLLM reads, and which of them each image is conditioned on.
            prompts, row_B, tokens_IPD = texts[part], None, None
            if sources is None:
                read = [self.model.recipe.prompt.text_of(text) for text in texts[part]]
                prompts = list(dict.fromkeys(read))
                row_B = torch.tensor([prompts.index(text) for text in read], device=device)
            else:
                tokens_IPD = mllm.image_tokens(
                    torch.cat([self._vit_pixels(source) for source in sources[part]])
                )
            pixels = sample_pixels(
                self.model,
                mllm.condition(prompts, tokens_IPD),
                number_B[part].to(device),
                row_B=row_B,
                size_px=size or self.size_px,
                **settings,
            )
            images += to_images(pixels)
        return images


@torch.no_grad()
def sample_pixels(
    model: IOMM,
    condition: Condition,
    image_B: Tensor,
    *,
    size_px: Size,
    row_B: Tensor | None = None,
    steps: int = 20,
    guidance: float = 1.0,
    seed: int = 0,
    method: str = "euler",
    shift: float | str = 1.0,
) -> Tensor:
    """Sample a batch of images: pixels (B, 3, H, W) in [-1, 1], float32.

    The MLLM reads every sample of the condition and the empty prompt once, before the first step.

    Args:
        model: the model.
        condition: packed condition.
        image_B: int64 numbers of the images. The noise of an image depends only on seed and number,
            not on its batch.
        size_px: side of the images, or (height, width).
        row_B: the sample of the condition that each image uses. Defaults to one image per sample.
        steps: sampler steps.
        guidance: weight of classifier-free guidance. Above 1 it needs a model trained with empty
            prompts (stage 2).
        seed: seed of the noise.
        method: "euler" or "heun".
        shift: resolution shift of the times, or "flux" (`sampler.sample`).
    """
    mllm, vae = model.frozen
    rows, columns = grid = vae.grid(*height_width(size_px))
    hidden_BCD, lengths_B = model.encode_condition(condition)
    if row_B is not None:
        hidden_BCD = hidden_BCD[row_B]
        lengths_B = None if lengths_B is None else lengths_B[row_B]
    empty_BCD = None
    if guidance != 1.0:
        empty_1CD, _ = model.encode_condition(mllm.condition([model.recipe.prompt.empty]))
        # With adapter.conditions "all", the lengths of prompts differ from that of the empty one.
        if lengths_B is not None or empty_1CD.shape[1] != hidden_BCD.shape[1]:
            if lengths_B is None:
                lengths_B = torch.full(
                    (len(hidden_BCD),), hidden_BCD.shape[1], device=hidden_BCD.device
                )
            lengths_B = torch.cat((lengths_B, torch.full_like(lengths_B, empty_1CD.shape[1])))
            longest = max(hidden_BCD.shape[1], empty_1CD.shape[1])
            hidden_BCD, empty_1CD = (
                F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (hidden_BCD, empty_1CD)
            )
        empty_BCD = empty_1CD.expand_as(hidden_BCD)
    noise_BNK = image_noise(seed, image_B, rows * columns, vae.token_dim)

    def velocity(x_BNK: Tensor, t_B: Tensor, condition_BCD: Tensor) -> Tensor:
        return model.velocity(x_BNK, t_B, condition_BCD, lengths_B, grid)

    tokens_BNK = sample(
        velocity,
        noise_BNK,
        hidden_BCD,
        empty_BCD,
        steps=steps,
        method=method,
        guidance=guidance,
        shift=shift,
    )
    return vae.decode(unpatch(tokens_BNK, rows * vae.patch, columns * vae.patch, vae.patch)).float()


def frozen_name(card: dict[str, Any], key: str, folder: Path) -> str:
    """Return the name of the MLLM or VAE that an exported folder needs.

    Raises:
        InputError: it was in a folder of the machine that exported the model.
    """
    name = card[key]
    # Earlier versions recorded the path.
    if name is not None and not (Path(name).is_absolute() and not Path(name).is_dir()):
        return name
    local = card.get(f"{key}_folder") or Path(name or "unknown").name
    raise InputError(
        f"{folder} needs the {key.upper()} of its training run, which was in a folder named "
        f"{local!r}. Give its path here with --{key}, or {key}= of from_pretrained"
    )


def shipped(name: str, kind: str) -> str:
    """Return the folder of the MLLM or VAE that ships with the package for "shapes", else `name`.

    kind: "mllm" or "vae".
    """
    if name != "shapes":
        return name
    weights = resources.files("iomm.engine.shapes") / "weights"
    return str(weights if kind == "mllm" else weights / "vae")


def height_width(size_px: Size) -> tuple[int, int]:
    """Return the (height, width) of a size."""
    return tuple(size_px) if isinstance(size_px, list | tuple) else (size_px, size_px)


def to_images(pixels_BCHW: Tensor) -> list[Image.Image]:
    """Convert pixels (B, 3, H, W) in [-1, 1] to PIL images."""
    levels = ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    array = levels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(a)) for a in array]


def image_grid(images: Sequence[Image.Image], columns: int, pad_px: int = 2) -> Image.Image:
    """Arrange images of one size row by row on a white sheet."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + pad_px) - pad_px, rows * (height + pad_px) - pad_px), "white"
    )
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + pad_px), (i // columns) * (height + pad_px)))
    return sheet
