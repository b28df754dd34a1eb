"""How a generator's tensors and shape are named in diffusers: FluxTransformer2DModel and ZImageTransformer2DModel.

Tables and arithmetic only; diffusers itself is not needed here, and iomm/weights.py does the files.
"""

import torch

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
    # In the last block.
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
# Our own key in config.json; diffusers ignores it and reads ones.
NORM_FREE = "iomm_parameter_free_norms"
TEXT_EMBEDDER = "time_text_embed.text_embedder."
# diffusers' default; our pooled text vector is always zero, and so are its weights
POOLED_DIM = 768


def under(ours, theirs, names):
    """The table `names` with prefixes on both sides."""
    return {
        f"{ours}.{our}": tuple(
            f"{theirs}.{their}" for their in ([value] if isinstance(value, str) else value)
        )
        for our, value in names.items()
    }


def module_names(config, patch):
    """Our module -> their modules, in the order in which their rows are stacked in ours."""
    if config.kind == "mmdit":
        names = {ours: (theirs,) for ours, theirs in FLUX.items()}
        for index in range(config.num_blocks):
            names |= under(
                f"blocks.{index}.latent_stream", f"transformer_blocks.{index}", FLUX_LATENT_STREAM
            )
            names |= under(
                f"blocks.{index}.condition_stream",
                f"transformer_blocks.{index}",
                FLUX_CONDITION_STREAM,
            )
        for index in range(config.num_single_blocks):
            names |= under(
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
            names |= under(f"{ours}.{index}", f"{theirs}.{index}", ZIMAGE_LAYER)
    return names


class Layout:
    """How the tensors of a generator of this shape lie in diffusers' model. `patch` is the VAE's, for Z-Image alone.

    pieces    our parameter -> [(their tensor, its rows)], stacked in that order
    fillers   their tensor -> (shape, value) where ours has nothing, or fewer rows, and the value changes no output:
              zeros for the pooled text vector and the last condition output, ones for parameter-free norms
    shapes    their tensor -> shape, all of them
    """

    def __init__(self, config, patch):
        self.config, self.patch = config, patch
        if config.kind == "single_stream" and config.token_dim % patch**2:
            raise InputError(
                f"a token of {config.token_dim} numbers is no patch of {patch} x {patch}: give the VAE's patch"
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
        self.fillers = (
            flux_fillers(config)
            if config.kind == "mmdit"
            else {
                f"{theirs}.weight": ((width,), 1.0)
                for theirs, width in norms(config, names, present)
            }
        )
        self.shapes |= {their: shape for their, (shape, _) in self.fillers.items()}

    def reorder(self, name, tensor, back=False):
        """A latent token's numbers are (channel, row, column) in ours and FLUX, (row, column, channel) in Z-Image."""
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

    def to_theirs(self, state):
        """Our state dict -> theirs."""
        check_tensors(
            "generator",
            {name: tuple(tensor.shape) for name, tensor in state.items()},
            self.model_shapes,
        )
        theirs = {}
        for name, pieces in self.pieces.items():
            tensors = self.reorder(name, state[name]).split([rows for _, rows in pieces])
            theirs |= {their: tensor for (their, _), tensor in zip(pieces, tensors)}
        like = state["latents_in.weight"]
        for their, (shape, value) in self.fillers.items():
            rest = like.new_full((shape[0] - len(theirs.get(their, ())), *shape[1:]), value)
            theirs[their] = torch.cat((theirs[their], rest)) if their in theirs else rest
        return theirs

    def to_ours(self, name, read):
        """Our parameter `name` from `read(their name)`."""
        return self.reorder(
            name, torch.cat([read(their)[:rows] for their, rows in self.pieces[name]]), back=True
        )


def flux_fillers(config):
    """What FLUX has and MMDiT has not -> (shape, 0)."""
    width, last = config.width, f"transformer_blocks.{config.num_blocks - 1}"
    shapes = {
        "time_text_embed.text_embedder.linear_1": (width, POOLED_DIM),
        "time_text_embed.text_embedder.linear_2": (width, width),
    }
    if not config.num_single_blocks:
        shapes |= {
            f"{last}.norm1_context.linear": (6 * width, width),
            f"{last}.attn.to_add_out": (width, width),
            f"{last}.attn.add_q_proj": (width, width),
            f"{last}.ff_context.net.0.proj": (4 * width, width),
            f"{last}.ff_context.net.2": (width, 4 * width),
        }
    weights = {f"{module}.weight": (shape, 0.0) for module, shape in shapes.items()}
    weights |= {f"{module}.bias": (shape[:1], 0.0) for module, shape in shapes.items()}
    return (
        weights
        if config.num_single_blocks
        else weights | {f"{last}.attn.norm_added_q.weight": ((config.head_dim,), 0.0)}
    )


def norms(config, names, present):
    """[(their norm, width)] of the norms that a parameter-free SingleStream has without a scale."""
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


def to_diffusers_config(config, patch):
    """GeneratorConfig -> diffusers' config.json. Raises InputError for what their class cannot say."""
    if config.kind == "mmdit":
        if config.rope_theta != 10000.0:
            raise InputError(
                f"FluxTransformer2DModel has rope theta 10000 and cannot hold this generator's {config.rope_theta}"
            )
        return {
            "_class_name": "FluxTransformer2DModel",
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
        "_class_name": "ZImageTransformer2DModel",
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
        # Positions that their tables hold: condition tokens, rows, columns.
        "axes_lens": [1024, 512, 512],
    }
    return description if config.norm_affine else description | {NORM_FREE: True}


def from_diffusers_config(description, where):
    """Diffusers' config.json -> (GeneratorConfig, patch). Raises InputError unless it describes one of our shapes."""
    read, patch = dict(description), 1
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
                f"{where} describes {read.get('_class_name', 'no diffusers model')}; "
                "wanted FluxTransformer2DModel or ZImageTransformer2DModel"
            )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} lacks or misstates {error}") from error
    wanted = to_diffusers_config(config, patch)
    free = {"axes_lens", "pooled_projection_dim", "out_channels"}
    wrong = [
        f"{key}={read.get(key)!r} (wanted {value!r})"
        for key, value in wanted.items()
        if key not in free and read.get(key) != value
    ]
    if read.get("out_channels") not in (None, read.get("in_channels")):
        wrong.append(f"out_channels={read['out_channels']!r} (wanted in_channels)")
    if wrong:
        raise InputError(
            f"{where} describes a shape that this engine does not have: {', '.join(wrong)}"
        )
    return config, patch


def check_tensors(where, got, wanted):
    """Raises InputError that lists the names that are missing, unknown or of another shape (name -> shape, both)."""
    problems = [f"missing {name}" for name in wanted if name not in got] + [
        f"unknown {name}" for name in got if name not in wanted
    ]
    problems += [
        f"{name} has shape {got[name]}, wanted {wanted[name]}"
        for name in wanted
        if name in got and got[name] != wanted[name]
    ]
    if problems:
        raise InputError(f"{where}: {len(problems)} tensors do not fit: {'; '.join(problems)}")
