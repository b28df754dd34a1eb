"""Create an InternVL: from a checkpoint, or of a known shape with random weights or none.

Only this module and engine/shapes/mllm.py, which creates and trains a small InternVL, may import
transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iomm.config import RECONSTRUCT, InputError, choice
from iomm.mllm import MLLM
from iomm.weights import move_frozen, stored_dtype

if TYPE_CHECKING:
    from transformers import InternVLConfig, PreTrainedTokenizerFast


def is_folder(name: str) -> bool:
    """Return whether `name` is a local folder. If not, it is a hub id.

    Raises:
        InputError: if it can be neither.
    """
    local = Path(name).is_dir()
    if not local and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError(
            f"model.mllm: no folder {name}. Give an existing folder, or a hub id such as "
            "OpenGVLab/InternVL3-2B-hf."
        )
    return local


def load_mllm(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> MLLM:
    """Load a frozen InternVL in transformers' own format.

    Only safetensors are read, and no code from the checkpoint is run. Weights are placed as in
    `weights.load_frozen`.

    Args:
        name: a local folder, a hub id, or random:<shape> for random weights of a known shape
            (RANDOM_SHAPES), which is useful only for measurements.
        revision: commit of the hub checkpoint.
        dtype: dtype of the weights.
        device: device of the weights.

    Raises:
        InputError: if there is no such checkpoint or it has another architecture.
    """
    from transformers import AutoConfig, AutoTokenizer, InternVLModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    if name.startswith("random:"):
        return random_mllm(random_shape(name), dtype, device)
    local = is_folder(name)
    options = dict(revision=revision, trust_remote_code=False, local_files_only=local)
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if config.model_type != "internvl":
            raise InputError(
                f"model.mllm: {name} is a {config.model_type} checkpoint. Expected InternVL in "
                "transformers' format, whose hub ids end in -hf."
            )
        internvl, report = InternVLModel.from_pretrained(
            name,
            use_safetensors=True,
            # Other dtypes are cast on the host, all at once.
            dtype=stored_dtype(name, "model", revision=revision) or dtype,
            output_loading_info=True,
            **options,
        )
        # Transformers would initialize missing weights at random.
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:5])
            raise InputError(f"model.mllm: {name} lacks the weights {missing}")
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.mllm: cannot load {name}: {reason}") from error
    move_frozen(internvl, device, dtype)
    return MLLM(internvl, tokenizer)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Return the tokenizer that `load_mllm` would load.

    Raises:
        InputError: if there is no such checkpoint.
    """
    from transformers import AutoTokenizer

    if name.startswith("random:"):
        return prompt_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False, local_files_only=is_folder(name)
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.mllm: cannot load the tokenizer of {name}: {reason}") from error


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

# Hub ids whose shape is known without a network.
HUB_SHAPES = {"OpenGVLab/InternVL3-2B-hf": INTERNVL3_2B}
# Shapes of random:<shape>.
RANDOM_SHAPES = {"internvl3-2b": INTERNVL3_2B, "internvl3-quarter": INTERNVL3_QUARTER}


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


def meta_mllm(vision: dict, text: dict) -> MLLM:
    """Return an MLLM of this shape on the meta device, without tokenizer, for counting."""
    from transformers import InternVLModel

    with torch.device("meta"):
        return MLLM(InternVLModel(internvl_config(vision, text)), None)


def mllm_without_weights(name: str, revision: str | None = None) -> MLLM:
    """Return the MLLM that `load_mllm` would load, on the meta device and without tokenizer.

    The shape of InternVL3-2B is known without a network. For other hub ids the config is fetched.

    Raises:
        InputError: if there is no such checkpoint or it has another architecture.
    """
    from transformers import AutoConfig, InternVLModel

    if name in HUB_SHAPES:
        return meta_mllm(**HUB_SHAPES[name])
    if name.startswith("random:"):
        return meta_mllm(**random_shape(name))
    local = is_folder(name)
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=False, local_files_only=local
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.mllm: cannot read the config of {name}: {str(error).strip().splitlines()[0]}"
        ) from error
    if config.model_type != "internvl":
        raise InputError(
            f"model.mllm: {name} is a {config.model_type} checkpoint. Expected InternVL in "
            "transformers' format, whose hub ids end in -hf."
        )
    with torch.device("meta"):
        return MLLM(InternVLModel(config), None)


def byte_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens on `texts`.

    It has the special tokens of Qwen2.5 and InternVL.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
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
    shape: dict[str, dict], dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> MLLM:
    """Return an MLLM of this shape with weights drawn from a seed on `device`.

    Nothing is read from or written to the disk.
    """
    from transformers import InternVLModel

    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        internvl = InternVLModel(internvl_config(**shape)).to(dtype)
    return MLLM(internvl, prompt_tokenizer())
