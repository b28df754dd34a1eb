"""Tensor names, shapes and configs of our generators in diffusers' format.

MMDiT maps to FluxTransformer2DModel or QwenImageTransformer2DModel, SingleStream to
ZImageTransformer2DModel. This module holds only tables and arithmetic and does not import
diffusers. iomm/weights.py reads and writes the files.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iomm.config import GeneratorConfig, InputError
from iomm.generator import empty_generator

FLUX = {
    "latents_in": "x_embedder",
    "condition_in": "context_embedder",
    "time_in.linear_in": "time_text_embed.timestep_embedder.linear_1",
    "time_in.linear_out": "time_text_embed.timestep_embedder.linear_2",
    "final_modulation": "norm_out.linear",
    "final": "proj_out",
}
FLUX_LATENT_STREAM = {
    "modulation": "norm1.linear",
    "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "out": "attn.to_out.0",
    "mlp_in": "ff.net.0.proj",
    "mlp_out": "ff.net.2",
}
FLUX_CONDITION_STREAM = {
    "modulation": "norm1_context.linear",
    "qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    # The last block has no queries of the condition.
    "kv": ("attn.add_k_proj", "attn.add_v_proj"),
    "q_norm": "attn.norm_added_q",
    "k_norm": "attn.norm_added_k",
    "out": "attn.to_add_out",
    "mlp_in": "ff_context.net.0.proj",
    "mlp_out": "ff_context.net.2",
}
FLUX_SINGLE = {
    "modulation": "norm.linear",
    "linear_in": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "linear_out": "proj_out",
}
QWEN = {
    "latents_in": "img_in",
    "condition_norm": "txt_norm",
    "condition_in": "txt_in",
    "time_in.linear_in": "time_text_embed.timestep_embedder.linear_1",
    "time_in.linear_out": "time_text_embed.timestep_embedder.linear_2",
    "final_modulation": "norm_out.linear",
    "final": "proj_out",
}
QWEN_LATENT_STREAM = FLUX_LATENT_STREAM | {
    "modulation": "img_mod.1",
    "mlp_in": "img_mlp.net.0.proj",
    "mlp_out": "img_mlp.net.2",
}
QWEN_CONDITION_STREAM = FLUX_CONDITION_STREAM | {
    "modulation": "txt_mod.1",
    "mlp_in": "txt_mlp.net.0.proj",
    "mlp_out": "txt_mlp.net.2",
}
ZIMAGE_LAYER = {
    "attention_norm_in": "attention_norm1",
    "attention_norm_out": "attention_norm2",
    "qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "q_norm": "attention.norm_q",
    "k_norm": "attention.norm_k",
    "out": "attention.to_out.0",
    "mlp_norm_in": "ffn_norm1",
    "mlp_norm_out": "ffn_norm2",
    "mlp_in": ("feed_forward.w1", "feed_forward.w3"),
    "mlp_out": "feed_forward.w2",
    "modulation": "adaLN_modulation.0",
}
PADS = {"latent_pad_1D": "x_pad_token", "condition_pad_1D": "cap_pad_token"}
# Our addition to config.json for norms without a scale. diffusers ignores it, and reads scales of
# one from the weights.
NORM_FREE = "iomm_parameter_free_norms"
TEXT_EMBEDDER = "time_text_embed.text_embedder."
# diffusers' default. Our pooled text vector is always zero, and so are its weights.
POOLED_DIM = 768

Shape = tuple[int, ...]


def diffusers_class(config: GeneratorConfig) -> str:
    """Return the name of the diffusers class that a generator of this shape maps to.

    Raises:
        InputError: if no class has this shape.
    """
    if config.kind == "single_stream":
        return "ZImageTransformer2DModel"
    if not config.condition_norm and config.positions == "corner":
        return "FluxTransformer2DModel"
    if config.condition_norm and config.positions == "centred" and not config.num_single_blocks:
        return "QwenImageTransformer2DModel"
    raise InputError(
        f"no diffusers model has condition_norm {config.condition_norm}, positions "
        f"{config.positions} and {config.num_single_blocks} single-stream blocks. Use a shape of "
        "FLUX.1 or Qwen-Image."
    )


def prefixed(
    ours: str, theirs: str, names: Mapping[str, str | tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Return the table `names` with a prefix on either side."""
    return {
        f"{ours}.{our}": tuple(
            f"{theirs}.{their}" for their in ([value] if isinstance(value, str) else value)
        )
        for our, value in names.items()
    }


def module_names(config: GeneratorConfig, patch: int) -> dict[str, tuple[str, ...]]:
    """Return {our module: their modules}, in the order in which ours stacks their rows."""
    if config.kind == "mmdit":
        ends, latents, condition = FLUX, FLUX_LATENT_STREAM, FLUX_CONDITION_STREAM
        if diffusers_class(config) == "QwenImageTransformer2DModel":
            ends, latents, condition = QWEN, QWEN_LATENT_STREAM, QWEN_CONDITION_STREAM
        names = {ours: (theirs,) for ours, theirs in ends.items()}
        for index in range(config.num_blocks):
            theirs = f"transformer_blocks.{index}"
            names |= prefixed(f"blocks.{index}.latent_stream", theirs, latents)
            names |= prefixed(f"blocks.{index}.condition_stream", theirs, condition)
        for index in range(config.num_single_blocks):
            names |= prefixed(
                f"single_blocks.{index}", f"single_transformer_blocks.{index}", FLUX_SINGLE
            )
        return names
    names = {
        "latents_in": (f"all_x_embedder.{patch}-1",),
        "condition_norm": ("cap_embedder.0",),
        "condition_in": ("cap_embedder.1",),
        "time_in.linear_in": ("t_embedder.mlp.0",),
        "time_in.linear_out": ("t_embedder.mlp.2",),
        "final_modulation": (f"all_final_layer.{patch}-1.adaLN_modulation.1",),
        "final": (f"all_final_layer.{patch}-1.linear",),
    }
    for ours, theirs, count in (
        ("latent_refiners", "noise_refiner", config.num_refiner_blocks),
        ("condition_refiners", "context_refiner", config.num_refiner_blocks),
        ("blocks", "layers", config.num_blocks),
    ):
        for index in range(count):
            names |= prefixed(f"{ours}.{index}", f"{theirs}.{index}", ZIMAGE_LAYER)
    return names


class Layout:
    """How the tensors of a generator of this shape are arranged in diffusers' model.

    Attributes:
        pieces: {our parameter: [(their tensor, its number of rows)]}, stacked in that order.
        fillers: {their tensor: (shape, value)} where we have no tensor, or fewer rows. The value
            changes no output: zero for the pooled text vector and the last condition output, one
            for parameter-free norms.
        shapes: {their tensor: shape}, for all their tensors.
        model_shapes: {our parameter: shape}.
    """

    def __init__(self, config: GeneratorConfig, patch: int):
        """Build the layout. `patch` is the VAE's and affects only Z-Image's tensors.

        Raises:
            InputError: if the patch does not fit the token dim.
        """
        self.config, self.patch = config, patch
        if diffusers_class(config) != "FluxTransformer2DModel" and config.token_dim % patch**2:
            raise InputError(
                f"a token of {config.token_dim} numbers cannot be a patch of {patch} x {patch}. "
                "Pass the VAE's patch."
            )
        names = module_names(config, patch)
        self.model_shapes, self.pieces, self.shapes, present = {}, {}, {}, set()
        for module_name, module in empty_generator(config, device="meta").named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                name = f"{module_name}.{kind}" if module_name else kind
                theirs = (
                    tuple(f"{their}.{kind}" for their in names[module_name])
                    if module_name
                    else (PADS[kind],)
                )
                rows = getattr(module, "parts", (len(parameter),))
                self.model_shapes[name] = tuple(parameter.shape)
                self.pieces[name] = list(zip(theirs, rows, strict=True))
                self.shapes |= {
                    their: (count, *parameter.shape[1:]) for their, count in self.pieces[name]
                }
            present.add(module_name)
        if config.kind == "mmdit":
            self.fillers = zero_fillers(config, names)
        else:
            self.fillers = {
                f"{theirs}.weight": ((width,), 1.0)
                for theirs, width in norms_without_scale(config, names, present)
            }
        self.shapes |= {their: shape for their, (shape, _) in self.fillers.items()}

    def reorder(self, name: str, tensor: Tensor, back: bool = False) -> Tensor:
        """Reorder the numbers of a latent token from our order to theirs, or back.

        They are (channel, row, column) in ours, FLUX and Qwen-Image, but (row, column, channel) in
        Z-Image.
        """
        if self.config.kind == "mmdit" or name not in (
            "latents_in.weight",
            "final.weight",
            "final.bias",
        ):
            return tensor
        order = (
            torch.arange(self.config.token_dim)
            .view(-1, self.patch, self.patch)
            .permute(1, 2, 0)
            .flatten()
        )
        order = (order.argsort() if back else order).to(tensor.device)
        return tensor[:, order] if name == "latents_in.weight" else tensor[order]

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert our state dict to theirs.

        Raises:
            InputError: if a tensor is missing, unknown or of another shape.
        """
        check_tensors(
            "generator",
            {name: tuple(tensor.shape) for name, tensor in state.items()},
            self.model_shapes,
        )
        theirs = {}
        for name, pieces in self.pieces.items():
            tensors = self.reorder(name, state[name]).split([rows for _, rows in pieces])
            theirs |= {their: tensor for (their, _), tensor in zip(pieces, tensors, strict=True)}
        like = state["latents_in.weight"]
        for their, (shape, value) in self.fillers.items():
            rest = like.new_full((shape[0] - len(theirs.get(their, ())), *shape[1:]), value)
            theirs[their] = torch.cat((theirs[their], rest)) if their in theirs else rest
        return theirs

    def to_ours(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Return our parameter `name`, where `read` returns their tensor of a given name."""
        pieces = [read(their)[:rows] for their, rows in self.pieces[name]]
        # A single piece stays a view, which may be mapped from a file.
        stacked = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return self.reorder(name, stacked, back=True)


def zero_fillers(
    config: GeneratorConfig, names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[Shape, float]]:
    """Return {tensor: (shape, 0)} for the tensors that FLUX or Qwen-Image has and MMDiT lacks.

    They are FLUX's embedding of the pooled text vector, and in both the parts of the last block
    whose result is discarded.
    """
    width, shapes = config.width, {}
    if diffusers_class(config) == "FluxTransformer2DModel":
        shapes |= {
            f"{TEXT_EMBEDDER}linear_1": (width, POOLED_DIM),
            f"{TEXT_EMBEDDER}linear_2": (width, width),
        }
    norms = {}
    if not config.num_single_blocks:
        stream = f"blocks.{config.num_blocks - 1}.condition_stream"
        shapes |= {
            names[f"{stream}.modulation"][0]: (6 * width, width),
            names[f"{stream}.out"][0]: (width, width),
            names[f"{stream}.qkv"][0]: (width, width),
            names[f"{stream}.mlp_in"][0]: (4 * width, width),
            names[f"{stream}.mlp_out"][0]: (width, 4 * width),
        }
        norms = {f"{names[f'{stream}.q_norm'][0]}.weight": ((config.head_dim,), 0.0)}
    weights = {f"{module}.weight": (shape, 0.0) for module, shape in shapes.items()}
    return (
        weights | {f"{module}.bias": (shape[:1], 0.0) for module, shape in shapes.items()} | norms
    )


def norms_without_scale(
    config: GeneratorConfig, names: dict[str, tuple[str, ...]], present: set[str]
) -> list[tuple[str, int]]:
    """Return [(their norm, width)] of the parameter-free norms of a SingleStream."""
    if config.norm_affine:
        return []
    sizes = {
        "condition_norm": config.condition_dim,
        "q_norm": config.head_dim,
        "k_norm": config.head_dim,
    }
    return [
        (names[name][0], sizes.get(name.split(".")[-1], config.width))
        for name in present
        if name in names and "norm" in name.split(".")[-1]
    ]


def to_diffusers_config(config: GeneratorConfig, patch: int) -> dict[str, Any]:
    """Return the contents of diffusers' config.json for a generator.

    Raises:
        InputError: if diffusers' class does not support the shape.
    """
    name = diffusers_class(config)
    if config.kind == "mmdit":
        if config.rope_theta != 10000.0:
            raise InputError(
                f"{name} has rope theta 10000 and does not support this generator's "
                f"{config.rope_theta}"
            )
        if name == "QwenImageTransformer2DModel":
            return {
                "_class_name": name,
                "patch_size": patch,
                "in_channels": config.token_dim,
                "out_channels": config.token_dim // patch**2,
                "num_layers": config.num_blocks,
                "attention_head_dim": config.head_dim,
                "num_attention_heads": config.num_heads,
                "joint_attention_dim": config.condition_dim,
                "guidance_embeds": False,
                "axes_dims_rope": list(config.rope_axes),
                "zero_cond_t": False,
                "use_additional_t_cond": False,
                "use_layer3d_rope": False,
            }
        return {
            "_class_name": name,
            "patch_size": 1,
            "in_channels": config.token_dim,
            "out_channels": None,
            "num_layers": config.num_blocks,
            "num_single_layers": config.num_single_blocks,
            "attention_head_dim": config.head_dim,
            "num_attention_heads": config.num_heads,
            "joint_attention_dim": config.condition_dim,
            "pooled_projection_dim": POOLED_DIM,
            "guidance_embeds": False,
            "axes_dims_rope": list(config.rope_axes),
        }
    description = {
        "_class_name": name,
        "all_patch_size": [patch],
        "all_f_patch_size": [1],
        "in_channels": config.token_dim // patch**2,
        "dim": config.width,
        "n_layers": config.num_blocks,
        "n_refiner_layers": config.num_refiner_blocks,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_heads,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": config.condition_dim,
        "siglip_feat_dim": None,
        "rope_theta": config.rope_theta,
        "t_scale": 1000.0,
        "axes_dims": list(config.rope_axes),
        # Sizes of their position tables: condition tokens, rows, columns.
        "axes_lens": [1024, 512, 512],
    }
    return description if config.norm_affine else description | {NORM_FREE: True}


# Entries that a config.json may omit, with the values of diffusers' classes. Checkpoints that are
# older than an entry lack it.
DEFAULTS = {
    "FluxTransformer2DModel": {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    },
    "QwenImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
        "zero_cond_t": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    },
    "ZImageTransformer2DModel": {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": 2560,
        "siglip_feat_dim": None,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
    },
}


def from_diffusers_config(
    description: Mapping[str, Any], where: Path | str, ignored: Collection[str] = ()
) -> tuple[GeneratorConfig, int]:
    """Return the GeneratorConfig and the patch that diffusers' config.json describes.

    Args:
        description: the contents of config.json.
        where: the file's name for error messages.
        ignored: entries that may have any value.

    Raises:
        InputError: unless it describes a shape that our generators support.
    """
    read, patch = DEFAULTS.get(description.get("_class_name"), {}) | dict(description), 1
    try:
        if read.get("_class_name") == "FluxTransformer2DModel":
            config = GeneratorConfig(
                width=read["num_attention_heads"] * read["attention_head_dim"],
                num_heads=read["num_attention_heads"],
                num_blocks=read["num_layers"],
                num_single_blocks=read["num_single_layers"],
                token_dim=read["in_channels"],
                condition_dim=read["joint_attention_dim"],
            )
        elif read.get("_class_name") == "QwenImageTransformer2DModel":
            patch = read["patch_size"]
            if not isinstance(patch, int) or patch < 1:
                raise ValueError(f"patch_size={patch!r}")
            config = GeneratorConfig(
                width=read["num_attention_heads"] * read["attention_head_dim"],
                num_heads=read["num_attention_heads"],
                num_blocks=read["num_layers"],
                token_dim=read["in_channels"],
                condition_dim=read["joint_attention_dim"],
                condition_norm=True,
                positions="centred",
            )
        elif read.get("_class_name") == "ZImageTransformer2DModel":
            (patch,) = read["all_patch_size"]
            config = GeneratorConfig(
                kind="single_stream",
                width=read["dim"],
                num_heads=read["n_heads"],
                num_blocks=read["n_layers"],
                num_refiner_blocks=read["n_refiner_layers"],
                token_dim=read["in_channels"] * patch**2,
                condition_dim=read["cap_feat_dim"],
                rope_theta=read["rope_theta"],
                norm_affine=not read.get(NORM_FREE, False),
            )
        else:
            raise InputError(
                f"{where} describes {read.get('_class_name', 'no diffusers model')}. "
                f"Expected {', '.join(DEFAULTS)}."
            )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} has a missing or invalid entry: {error}") from error
    expected = to_diffusers_config(config, patch)
    unchecked = {"axes_lens", "pooled_projection_dim", *ignored}
    if description.get("_class_name") == "FluxTransformer2DModel":
        unchecked.add("out_channels")
    wrong = [
        f"{key}={read.get(key)!r} (expected {value!r})"
        for key, value in expected.items()
        if key not in unchecked and read.get(key) != value
    ]
    if "out_channels" in unchecked and read["out_channels"] not in (None, read["in_channels"]):
        wrong.append(f"out_channels={read['out_channels']!r} (expected in_channels)")
    if wrong:
        raise InputError(f"{where} describes an unsupported shape: {', '.join(wrong)}")
    return config, patch


def check_tensors(
    where: Path | str, got: Mapping[str, Shape], expected: Mapping[str, Shape]
) -> None:
    """Compare two mappings from tensor name to shape.

    Raises:
        InputError: with a list of the names that are missing, unknown or of another shape.
    """
    problems = [f"missing {name}" for name in expected if name not in got] + [
        f"unknown {name}" for name in got if name not in expected
    ]
    problems += [
        f"{name} has shape {got[name]}, expected {expected[name]}"
        for name in expected
        if name in got and got[name] != expected[name]
    ]
    if problems:
        raise InputError(f"{where}: {len(problems)} tensors do not match: {'; '.join(problems)}")
