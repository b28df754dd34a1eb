"""Where an InternVL comes from: a checkpoint, or a known shape with random weights or none.

A door to transformers; engine/shapes/mllm.py, which makes and trains a small one, is the other.
"""

from pathlib import Path

import torch

from iomm.config import InputError, choice
from iomm.mllm import MLLM, RECONSTRUCT


def is_folder(name):
    """Whether `name` is a local folder; if not, it is a hub id. Raises InputError for what can be neither."""
    local = Path(name).is_dir()
    if not local and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError(
            f"model.mllm: no folder {name}; give a folder or a hub id such as OpenGVLab/InternVL3-2B-hf"
        )
    return local


def load_mllm(name, *, revision=None, dtype=torch.bfloat16, device="cpu"):
    """Loads a frozen InternVL from a local folder or a hub id in transformers' own format, safetensors only; random:<shape>
    makes one of a known shape (RANDOM), with random weights: for measuring, it understands nothing.

    Never runs code from the checkpoint. Raises InputError when there is none or it is of another architecture.
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
                f"model.mllm: {name} is a {config.model_type} checkpoint; "
                "wanted InternVL in transformers' format (its hub names end in -hf)"
            )
        internvl, report = InternVLModel.from_pretrained(
            name, use_safetensors=True, dtype=dtype, output_loading_info=True, **options
        )
        # Transformers would go on with random numbers.
        if report["missing_keys"]:
            raise InputError(
                f"model.mllm: {name} lacks the weights {', '.join(sorted(report['missing_keys'])[:5])}"
            )
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.mllm: cannot load {name}: {reason}") from error
    return MLLM(internvl.to(device), tokenizer)


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

# InternVL3-2B's widths by four and depth by 19 / 4, as the preset iomm-b-quarter. 49 image tokens and not 64, because the
# prompt's 21 tokens cannot shrink: so prompt, image and 64 queries are a quarter of IOMM-B's 533. 7 ViT layers, and not 5,
# make up for its smaller image.
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

KNOWN = {"OpenGVLab/InternVL3-2B-hf": INTERNVL3_2B}
RANDOM = {"internvl3-2b": INTERNVL3_2B, "internvl3-quarter": INTERNVL3_QUARTER}


def random_shape(name):
    """random:<shape> -> keyword arguments of `internvl_config`. Raises InputError for an unknown shape."""
    shape = name.partition(":")[2]
    choice("model.mllm random:", shape, tuple(RANDOM))
    return RANDOM[shape]


def internvl_config(vision, text, **more):
    """InternVLConfig from keyword arguments of its parts; the decoder is Qwen2 unless text says model_type qwen3."""
    from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig

    vision = InternVLVisionConfig(**vision)
    return InternVLConfig(
        vision_config=vision,
        text_config=AutoConfig.for_model(**{"model_type": "qwen2", **text}),
        image_seq_length=(vision.image_size[0] // vision.patch_size[0] // 2) ** 2,
        **more,
    )


def shape_of_mllm(vision, text):
    """An MLLM of this shape on the meta device, without weights and tokenizer: for counting."""
    from transformers import InternVLModel

    with torch.device("meta"):
        return MLLM(InternVLModel(internvl_config(vision, text)), None)


def mllm_without_weights(name, revision=None):
    """The MLLM that load_mllm would load, on the meta device, without tokenizer. InternVL3-2B is known without a
    network; of another hub id the config is fetched. Raises InputError.
    """
    from transformers import AutoConfig, InternVLModel

    if name in KNOWN:
        return shape_of_mllm(**KNOWN[name])
    if name.startswith("random:"):
        return shape_of_mllm(**random_shape(name))
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
            f"model.mllm: {name} is a {config.model_type} checkpoint; wanted InternVL in transformers' format"
        )
    with torch.device("meta"):
        return MLLM(InternVLModel(config), None)


def byte_tokenizer(texts, vocab_size=512):
    """Byte-level BPE of at most vocab_size tokens trained on `texts`, with the special tokens of Qwen2.5 and InternVL."""
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


def prompt_tokenizer():
    """One that knows the words of the turn and of the fixed prompt, so that these are 21 tokens, as with Qwen2.5's."""
    return byte_tokenizer([RECONSTRUCT, "user\n", "assistant\n"] * 2)


def random_mllm(shape, dtype, device, seed=0):
    """An MLLM of this shape whose weights are drawn on `device`, from a seed, without touching the disk."""
    from transformers import InternVLModel

    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        internvl = InternVLModel(internvl_config(**shape)).to(dtype)
    return MLLM(internvl, prompt_tokenizer())
