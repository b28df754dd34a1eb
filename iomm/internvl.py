"""InternVL's vision encoder, and how to create an MLLM.

An MLLM comes from a checkpoint, or has a known shape with random weights or none. Only this module,
and engine/shapes/mllm.py, which creates and trains a small InternVL, may import transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iomm.config import RECONSTRUCT, InputError, choice
from iomm.kernels.image_patches import image_patches, normalised
from iomm.mllm import IMAGE_MEAN, IMAGE_STD, MLLM
from iomm.qwen_vl import QwenVL
from iomm.weights import move_frozen, stored_dtype

if TYPE_CHECKING:
    from transformers import InternVLConfig, PretrainedConfig, PreTrainedTokenizerFast


class InternVL(MLLM):
    """A frozen InternVL: ViT, projector, and Qwen2 or Qwen3 decoder."""

    def __init__(self, internvl: nn.Module, tokenizer: Any):
        super().__init__(internvl, tokenizer)
        config = internvl.config
        if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
            raise InputError(
                "model.mllm: the image tokens must come from the ViT's last layer without the "
                f"class token, got layer {config.vision_feature_layer}, "
                f"strategy {config.vision_feature_select_strategy}"
            )
        self.vit_px = config.vision_config.image_size[0]
        self.vit_width = config.vision_config.hidden_size
        side = self.vit_px // config.vision_config.patch_size[0]
        self.num_image_tokens = int(side * config.downsample_ratio) ** 2

    @property
    def vit_layers(self) -> nn.Module:
        """The ViT's layers."""
        return self.backbone.vision_tower.encoder

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile each ViT layer and the decoder layers with torch.compile."""
        for layer in self.vit_layers.layer:
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend=backend)
        super().compile_parts(backend)

    @torch.no_grad()
    def vit_states(self, vit_pixels: Tensor) -> Tensor:
        """Return the ViT's last hidden states (B, patches, W), normed, without class token.

        Their image tokens equal those of transformers' get_image_features, without its hooks on
        every layer, which torch.compile cannot trace.

        Args:
            vit_pixels: uint8 (B, vit_px, vit_px, 3), or float (B, 3, vit_px, vit_px) normalised by
                IMAGE_MEAN and IMAGE_STD.
        """
        tower = self.backbone.vision_tower
        if vit_pixels.dtype != torch.uint8:
            embedded = tower.embeddings(vit_pixels.to(self.dtype))
        elif vit_pixels.is_cuda:
            embedded = self.embed_bytes(vit_pixels)
        else:
            # On a CPU a single matrix product is no faster (LOG.md, 2026-11-30), and it rounds
            # differently from the convolution of earlier runs.
            embedded = tower.embeddings(
                normalised(vit_pixels, IMAGE_MEAN, IMAGE_STD).to(self.dtype)
            )
        return tower.layernorm(tower.encoder(embedded).last_hidden_state)[:, 1:]

    def embed_bytes(self, pixels_BHWC: Tensor) -> Tensor:
        """Return the ViT's embeddings of uint8 pixels.

        One pass normalises the pixels and cuts them into patch rows. One matrix product with the
        convolution's weight embeds them.
        """
        embeddings = self.backbone.vision_tower.embeddings
        projection = embeddings.patch_embeddings.projection
        rows_BNK = image_patches(
            pixels_BHWC,
            projection.kernel_size[0],
            mean=IMAGE_MEAN,
            std=IMAGE_STD,
            dtype=projection.weight.dtype,
        )
        patches_BNW = F.linear(rows_BNK, projection.weight.flatten(1), projection.bias)
        class_B1W = embeddings.cls_token.expand(len(patches_BNW), -1, -1)
        tokens_BNW = torch.cat((class_B1W, patches_BNW), dim=1)
        if embeddings.position_embeddings is None:
            return tokens_BNW
        return tokens_BNW + embeddings.position_embeddings

    @torch.no_grad()
    def project(self, states_BNW: Tensor) -> Tensor:
        """Return the image tokens (B, P, D) of the hidden states that `vit_states` returned.

        They are a square in row-major order. Each token covers 2 x 2 patches.
        """
        side, ratio = math.isqrt(states_BNW.shape[1]), self.backbone.config.downsample_ratio
        shuffled = self.backbone.pixel_shuffle(
            states_BNW.unflatten(1, (side, side)), scale_factor=ratio
        )
        return self.backbone.multi_modal_projector(shuffled.flatten(1, 2))

    def vit_flops(self, projector: bool = True) -> int:
        """Return the forward FLOPs of one image through the ViT and, optionally, the projector.

        Each matrix product counts 2 m n k.
        """
        vision, width = self.backbone.config.vision_config, self.width
        patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
        tokens, inner = patches + 1, vision.hidden_size
        linears = tokens * (8 * inner**2 + 4 * inner * vision.intermediate_size)
        layer = linears + 4 * tokens**2 * inner
        total = 2 * patches * 3 * vision.patch_size[0] ** 2 * inner
        total += vision.num_hidden_layers * layer
        if projector:
            shuffled = inner * patches // self.num_image_tokens
            total += 2 * self.num_image_tokens * (shuffled * width + width**2)
        return total


# {model_type of transformers' config: (class of transformers, ours)}.
ARCHITECTURES = {
    "internvl": ("InternVLModel", InternVL),
    "qwen2_5_vl": ("Qwen2_5_VLModel", QwenVL),
}


def find_checkpoint(name: str) -> tuple[str, str, dict[str, Any]]:
    """Return where the model and its tokenizer are, and options that both are read with.

    Args:
        name: a local folder, also that of a diffusers pipeline with `text_encoder` and `tokenizer`,
            or a hub id owner/name[/text_encoder].

    Raises:
        InputError: if it can be neither.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and (folder / "text_encoder").is_dir():
            return str(folder / "text_encoder"), str(folder / "tokenizer"), {}
        return name, name, {}
    owner, *repository = name.split("/")
    if len(repository) not in (1, 2) or name.startswith((".", "/", "~")) or "" in repository:
        raise InputError(
            f"model.mllm: no folder {name}. Give an existing folder, or a hub id such as "
            "OpenGVLab/InternVL3-2B-hf or Qwen/Qwen2.5-VL-7B-Instruct."
        )
    return (
        f"{owner}/{repository[0]}",
        f"{owner}/{repository[0]}",
        dict(zip(("subfolder",), repository[1:], strict=False)),
    )


def read_config(name: str, revision: str | None) -> PretrainedConfig:
    """Return transformers' config of a checkpoint.

    Raises:
        InputError: if it cannot be read or describes another architecture.
    """
    from transformers import AutoConfig

    path, _, subfolder = find_checkpoint(name)
    try:
        config = AutoConfig.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=False,
            local_files_only=Path(path).is_dir(),
            **subfolder,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model.mllm: cannot read the config of {name}: {str(error).strip().splitlines()[0]}"
        ) from error
    if config.model_type not in ARCHITECTURES:
        raise InputError(
            f"model.mllm: {name} is a {config.model_type} checkpoint. Expected InternVL in "
            "transformers' format, whose hub ids end in -hf, or Qwen2.5-VL."
        )
    return config


def load_mllm(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    vit_px: int | None = None,
) -> MLLM:
    """Load a frozen InternVL or Qwen2.5-VL in transformers' own format.

    Only safetensors are read, and no code from the checkpoint is run. Weights are placed as in
    `weights.load_frozen`.

    Args:
        name: a local folder, also that of a diffusers pipeline, a hub id owner/name[/subfolder], or
            random:<shape> for random weights of a known shape (RANDOM_SHAPES), which is useful only
            for measurements.
        revision: commit of the hub checkpoint.
        dtype: dtype of the weights.
        device: device of the weights.
        vit_px: side of the ViT's square input, for a Qwen2.5-VL.

    Raises:
        InputError: if there is no such checkpoint or it has another architecture.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    if name.startswith("random:"):
        return random_mllm(random_shape(name), dtype, device, vit_px=vit_px)
    path, _, subfolder = find_checkpoint(name)
    config = read_config(name, revision)
    model = getattr(transformers, ARCHITECTURES[config.model_type][0])
    try:
        backbone, report = model.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=False,
            local_files_only=Path(path).is_dir(),
            use_safetensors=True,
            # Other dtypes are cast on the host, all at once.
            dtype=stored_dtype(path, "model", revision=revision, **subfolder) or dtype,
            output_loading_info=True,
            **subfolder,
        )
        # Transformers would initialize missing weights at random.
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:5])
            raise InputError(f"model.mllm: {name} lacks the weights {missing}")
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.mllm: cannot load {name}: {reason}") from error
    tokenizer = load_tokenizer(name, revision)
    move_frozen(backbone, device, dtype)
    return frozen_mllm(backbone, tokenizer, vit_px)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Return the tokenizer that `load_mllm` would load.

    Raises:
        InputError: if there is no such checkpoint.
    """
    from transformers import AutoTokenizer

    if name.startswith("random:"):
        return prompt_tokenizer()
    _, path, subfolder = find_checkpoint(name)
    try:
        # A pipeline on the hub has its tokenizer in another subfolder.
        return AutoTokenizer.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=False,
            local_files_only=Path(path).is_dir(),
            **dict.fromkeys(subfolder, "tokenizer"),
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.mllm: cannot load the tokenizer of {name}: {reason}") from error


def frozen_mllm(backbone: nn.Module, tokenizer: Any, vit_px: int | None = None) -> MLLM:
    """Return the MLLM around a model of transformers.

    Raises:
        InputError: if vit_px is not None and not the side of its ViT's input.
    """
    if backbone.config.model_type == "qwen2_5_vl":
        return QwenVL(backbone, tokenizer, vit_px)
    mllm = InternVL(backbone, tokenizer)
    if vit_px not in (None, mllm.vit_px):
        raise InputError(
            f"model.vit_px is {vit_px}, but the ViT of this InternVL takes {mllm.vit_px} px. Leave "
            "model.vit_px out."
        )
    return mllm


# OpenGVLab/InternVL3-2B: InternViT-300M and Qwen2.5-1.5B.
INTERNVL3_2B = {
    "vision": dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=448,
        patch_size=14,
        attention_bias=True,
    ),
    "text": dict(
        vocab_size=151674,
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        max_position_embeddings=32768,
    ),
}

# InternVL3-2B with its widths divided by 4 and its depth by 19 / 4, like the preset iomm-b-quarter.
# It has 49 image tokens instead of 64, because the prompt's 21 tokens cannot shrink: prompt, image
# and 64 queries are then a quarter of IOMM-B's 533 tokens. It has 7 ViT layers instead of 5 to make
# up for the smaller image.
INTERNVL3_QUARTER = {
    "vision": dict(
        hidden_size=256,
        num_hidden_layers=7,
        num_attention_heads=4,
        intermediate_size=1024,
        image_size=196,
        patch_size=14,
        attention_bias=True,
    ),
    "text": dict(
        vocab_size=512,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=1,
        intermediate_size=2240,
        max_position_embeddings=1024,
    ),
}

# Qwen/Qwen2.5-VL-7B-Instruct, the text encoder of Qwen-Image.
QWEN2_5_VL_7B = {
    "vision": dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=3584,
    ),
    "text": dict(
        model_type="qwen2_5_vl_text",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=128000,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
    ),
}

# Hub ids whose shape is known without a network.
HUB_SHAPES = {
    "OpenGVLab/InternVL3-2B-hf": INTERNVL3_2B,
    "Qwen/Qwen2.5-VL-7B-Instruct": QWEN2_5_VL_7B,
    "Qwen/Qwen-Image/text_encoder": QWEN2_5_VL_7B,
}
# Shapes of random:<shape>.
RANDOM_SHAPES = {
    "internvl3-2b": INTERNVL3_2B,
    "internvl3-quarter": INTERNVL3_QUARTER,
    "qwen2.5-vl-7b": QWEN2_5_VL_7B,
}


def random_shape(name: str) -> dict[str, dict]:
    """Return the keyword arguments of `internvl_config` for random:<shape>.

    Raises:
        InputError: if the shape is unknown.
    """
    shape = name.partition(":")[2]
    choice("model.mllm random:", shape, tuple(RANDOM_SHAPES))
    return RANDOM_SHAPES[shape]


def internvl_config(vision: dict, text: dict, **more: Any) -> InternVLConfig:
    """Return an InternVLConfig from keyword arguments of its parts.

    The decoder is Qwen2, unless `text` sets model_type to qwen3.
    """
    from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig

    vision = InternVLVisionConfig(**vision)
    return InternVLConfig(
        vision_config=vision,
        text_config=AutoConfig.for_model(**{"model_type": "qwen2", **text}),
        image_seq_length=(vision.image_size[0] // vision.patch_size[0] // 2) ** 2,
        **more,
    )


def new_backbone(vision: dict, text: dict) -> nn.Module:
    """Return transformers' model of this shape with weights from torch's global generator."""
    import transformers

    if text.get("model_type") == "qwen2_5_vl_text":
        config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text)
    else:
        config = internvl_config(vision, text)
    return getattr(transformers, ARCHITECTURES[config.model_type][0])(config)


def meta_mllm(vision: dict, text: dict, vit_px: int | None = None) -> MLLM:
    """Return an MLLM of this shape on the meta device, without tokenizer, for counting."""
    with torch.device("meta"):
        return frozen_mllm(new_backbone(vision, text), None, vit_px)


def mllm_without_weights(name: str, revision: str | None = None, vit_px: int | None = None) -> MLLM:
    """Return the MLLM that `load_mllm` would load, on the meta device and without tokenizer.

    The shapes of HUB_SHAPES are known without a network. For other hub ids the config is fetched.

    Raises:
        InputError: if there is no such checkpoint or it has another architecture.
    """
    import transformers

    if name in HUB_SHAPES:
        return meta_mllm(**HUB_SHAPES[name], vit_px=vit_px)
    if name.startswith("random:"):
        return meta_mllm(**random_shape(name), vit_px=vit_px)
    config = read_config(name, revision)
    with torch.device("meta"):
        backbone = getattr(transformers, ARCHITECTURES[config.model_type][0])(config)
        return frozen_mllm(backbone, None, vit_px)


def byte_tokenizer(
    texts: Iterable[str], vocab_size: int = 512, more: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens on `texts`.

    It has the special tokens of Qwen2.5 and InternVL, and `more`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    special += more
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=special[0],
        pad_token=special[0],
        additional_special_tokens=special[1:],
    )


def prompt_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte tokenizer trained on the words of the user turn and the fixed prompt.

    They become 21 tokens, as with Qwen2.5's tokenizer.
    """
    return byte_tokenizer([RECONSTRUCT, "user\n", "assistant\n"] * 2)


def random_mllm(
    shape: dict[str, dict],
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    vit_px: int | None = None,
) -> MLLM:
    """Return an MLLM of this shape with weights drawn from a seed on `device`.

    Nothing is read from or written to the disk.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        backbone = new_backbone(**shape).to(dtype)
    return frozen_mllm(backbone, prompt_tokenizer(), vit_px)
