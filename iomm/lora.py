"""LoRA: train small matrices beside the linear layers of a frozen generator, and nothing else.

A target layer W x becomes W x + alpha / rank B A x (arXiv 2106.09685). Only A and B are parameters.
The frozen weights become buffers of their modules: these move, cast and save them as before, but
the optimizer, ZeRO, the moving average and checkpoints, which walk over parameters(), do not see
them. The layers keep their class and their names, and a forward hook adds the branch.

Targets have the names of diffusers' layers, one for each part of a fused layer.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iomm.config import InputError, LoraConfig
from iomm.generator import empty_generator
from iomm.kernels.philox import LORA_DROPOUT, uniform
from iomm.layers import at_least_float32, generator_for
from iomm.layout import Layout, module_names
from iomm.mmdit import MMDiT
from iomm.single_stream import SingleStream
from iomm.weights import write_tensors

Generator = MMDiT | SingleStream

# Targets of the paper's authors for Qwen-Image (TwinFlow's configs; the paper lists none), and the
# layers of FLUX and Z-Image that correspond to them. Each architecture has some of these names.
TARGETS = (
    # Attention: FLUX, Qwen-Image and Z-Image, then the condition of the first two.
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    # MLPs: Qwen-Image, FLUX's dual and single blocks, Z-Image.
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_mlp", "single_transformer_blocks.*.proj_out"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    # Time embedding.
    *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
    *("t_embedder.mlp.0", "t_embedder.mlp.2"),
)
# diffusers' name of a file with LoRA weights.
FILE = "pytorch_lora_weights.safetensors"
# Layers whose outputs enter a block's attention.
PROJECTIONS = ("qkv", "kv", "linear_in")


class Branch(nn.Module):
    """The trained branch of a frozen linear layer: (..., in) -> alpha / rank B A x (..., out).

    A fused layer has an A and a B for each part that is a target, and the matrices A are fused as
    well. Parts that are no target get zeros.
    """

    def __init__(self, linear: nn.Linear, targets: Sequence[int], config: LoraConfig):
        """Create the branch of `linear` for its parts with these indexes, without weights."""
        super().__init__()
        self.rows = tuple(getattr(linear, "parts", (linear.out_features,)))
        self.targets = tuple(targets)
        self.rank, self.scale = config.rank, config.alpha / config.rank
        self.dropout = config.dropout
        device = linear.weight.device
        self.A = nn.Linear(
            linear.in_features, self.rank * len(self.targets), bias=False, device=device
        )
        # Muon treats each part as a matrix.
        self.A.parts = (self.rank,) * len(self.targets)
        self.B = nn.ModuleList(
            nn.Linear(self.rank, self.rows[part], bias=False, device=device)
            for part in self.targets
        )
        # Set by number_rows: a number for each row of the input. Dropout needs it.
        self.n_R: Tensor | None = None
        self.seed = 0
        # The frozen weight while B A is merged into the layer.
        self.unmerged: Tensor | None = None

    @torch.no_grad()
    def init_weights(self, seed: int, name: str) -> None:
        """Draw A uniform in +-1 / sqrt(in), as peft does by default; B is zero."""
        self.seed = seed
        bound = 1 / math.sqrt(self.A.in_features)
        random = generator_for(seed, f"{name}.lora.A")
        self.A.weight.copy_(
            torch.empty(self.A.weight.shape).uniform_(-bound, bound, generator=random)
        )
        for part in self.B:
            part.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.A(self.drop(x)) * self.scale
        updates = [None] * len(self.rows)
        for part, of_part, B in zip(
            self.targets, hidden.split(self.rank, dim=-1), self.B, strict=True
        ):
            updates[part] = B(of_part)
        if len(updates) == 1:
            return updates[0]
        return torch.cat(
            [
                hidden.new_zeros(*hidden.shape[:-1], rows) if update is None else update
                for update, rows in zip(updates, self.rows, strict=True)
            ],
            dim=-1,
        )

    def drop(self, x: Tensor) -> Tensor:
        """Return x after dropout if its rows are numbered, as they are in training.

        Which values are dropped depends on (seed, number of the row), as everything random does.
        """
        if not self.dropout or self.n_R is None:
            return x
        drawn = uniform(self.seed, LORA_DROPOUT, self.n_R, x[0].numel()).view(x.shape)
        return torch.where(drawn < self.dropout, 0, x / (1 - self.dropout))

    def update(self) -> Tensor:
        """Return alpha / rank B A as a matrix (out, in), in at least float32."""
        rows = [
            at_least_float32(self.A.weight).new_zeros(rows, self.A.in_features)
            for rows in self.rows
        ]
        for part, A, B in self.pairs():
            rows[part] = self.scale * (at_least_float32(B) @ at_least_float32(A))
        return torch.cat(rows)

    def pairs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (index of the part, A (rank, in), B (rows, rank)) of each target."""
        matrices = self.A.weight.detach().split(self.rank)
        for part, A, B in zip(self.targets, matrices, self.B, strict=True):
            yield part, A, B.weight.detach()


def add_branch(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Add the branch to a layer's output. A forward hook."""
    return output if linear.lora.unmerged is not None else output + linear.lora(inputs[0])


def freeze(model: nn.Module) -> None:
    """Turn all parameters into buffers with the same names."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return {name: tensor} of what `freeze` froze, with the names that the parameters had."""
    return dict(model.named_buffers())


def layers_with_lora(model: nn.Module) -> dict[str, nn.Linear]:
    """Return {name: layer} of the layers that have a branch."""
    return {
        name.removesuffix(".lora"): model.get_submodule(name.removesuffix(".lora"))
        for name, module in model.named_modules()
        if isinstance(module, Branch)
    }


def add_lora(
    generator: Generator, config: LoraConfig, *, seed: int = 0, patch: int = 1, check: bool = True
) -> None:
    """Add a branch to every target layer of a frozen generator.

    A is drawn from the seed and B is zero, so the outputs stay the same. On the meta device nothing
    is drawn.

    Args:
        generator: the generator, after `freeze`.
        config: rank, alpha, dropout and targets.
        seed: seed of A and of dropout.
        patch: the VAE's patch, as in Layout.
        check: whether each of config.targets must match a layer.

    Raises:
        InputError: if one of config.targets matches no layer.
    """
    chosen = target_parts(generator, config.targets, patch, check)
    attach(generator, chosen, config)
    twin = empty_generator(generator.config, device="meta")
    freeze(twin)
    attach(twin, chosen, config)
    count_products(generator, twin)
    if generator.final.weight.is_meta:
        return
    for name, linear in layers_with_lora(generator).items():
        linear.lora.init_weights(seed, name)


def attach(generator: Generator, chosen: dict[str, list[int]], config: LoraConfig) -> None:
    """Give layers branches without weights, where `chosen` is {layer: indexes of parts}."""
    for name, parts in chosen.items():
        linear = generator.get_submodule(name)
        linear.lora = Branch(linear, parts, config)
        linear.register_forward_hook(add_branch)


def target_parts(
    generator: Generator, targets: Sequence[str], patch: int, check: bool = True
) -> dict[str, list[int]]:
    """Return {layer: indexes of its parts} that the targets match; no targets mean TARGETS.

    A target matches a layer of diffusers if it is the layer's name or the name's end after a dot. *
    matches any text.
    """
    names = module_names(generator.config, patch)
    layers = {
        name: names[name]
        for name, module in generator.named_modules()
        if isinstance(module, nn.Linear)
    }
    chosen, unused = {}, dict.fromkeys(targets)
    for name, theirs in layers.items():
        for part, their in enumerate(theirs):
            found = [
                target
                for target in targets or TARGETS
                if fnmatchcase(their, target) or fnmatchcase(their, f"*.{target}")
            ]
            if found:
                chosen.setdefault(name, []).append(part)
            for target in found:
                unused.pop(target, None)
    if check and unused:
        exist = sorted(
            {re.sub(r"\.\d+\.", ".*.", their) for part in layers.values() for their in part}
        )
        raise InputError(
            f"lora.targets: {', '.join(unused)} matches no linear layer of the generator. "
            f"Choose from {', '.join(exist)}, or give the end of such a name"
        )
    return chosen


def count_products(generator: Generator, twin: Generator) -> None:
    """Set how many matrix products each linear layer takes in a training step, for iomm/flops.py.

    One is its forward pass. A second one gives the gradient of its input, if anything before the
    layer is trained, and a third one that of its weight, if that is trained. A block's attention
    runs backward only if its input depends on something trained. A pass of `twin`, a copy on the
    meta device, shows which inputs have a gradient.
    """
    config, passes = generator.config, {}

    def record(name: str, linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        passes[name] = inputs[0].requires_grad, output.requires_grad

    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda *args, name=name: record(name, *args), always_call=True
            )
    with torch.device("meta"):
        twin(
            torch.empty(1, 4, config.token_dim),
            torch.empty(1),
            torch.empty(1, 2, config.condition_dim),
            (2, 2),
        )
    for name, (input_grad, _) in passes.items():
        linear = generator.get_submodule(name)
        linear.products = 1 + input_grad + isinstance(linear.weight, nn.Parameter)
    for name, module in generator.named_modules():
        if isinstance(module, generator.block_classes):
            differentiated = any(
                output_grad
                for linear, (_, output_grad) in passes.items()
                if linear.startswith(f"{name}.") and linear.split(".")[-1] in PROJECTIONS
            )
            module.attention_products = 3 if differentiated else 1


def number_rows(generator: nn.Module, n_R: Tensor | None) -> None:
    """Number the rows of the next forward pass, for dropout; None turns dropout off.

    The numbers stay set for the backward pass, where recomputed blocks draw the same again. Every
    layer gets its own ones.
    """
    branches = [module for module in generator.modules() if isinstance(module, Branch)]
    for index, branch in enumerate(branches):
        branch.n_R = None if n_R is None else n_R * len(branches) + index


@torch.no_grad()
def merge(generator: nn.Module) -> None:
    """Add B A to the weights of the layers, whose branches then do nothing.

    The frozen weights are kept for `unmerge`, which restores them bit by bit.
    """
    for linear in layers_with_lora(generator).values():
        branch = linear.lora
        if branch.unmerged is None:
            branch.unmerged = linear.weight
            exact = at_least_float32(linear.weight) + branch.update()
            linear.weight = exact.to(linear.weight.dtype)


def unmerge(generator: nn.Module) -> None:
    """Undo `merge`."""
    for linear in layers_with_lora(generator).values():
        branch = linear.lora
        if branch.unmerged is not None:
            linear.weight, branch.unmerged = branch.unmerged, None


@contextmanager
def merged(generator: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Merge, yield the state dict of a generator without LoRA, and unmerge."""
    merge(generator)
    try:
        yield frozen_weights(generator)
    finally:
        unmerge(generator)


def reordered(layout: Layout, name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B of a layer with latent tokens in diffusers' order, which Z-Image has.

    They are columns of the first layer and rows of the last one.
    """
    if name == "latents_in":
        A = layout.reorder("latents_in.weight", A)
    if name == "final":
        B = layout.reorder("final.weight", B)
    return A, B


def diffusers_lora(generator: Generator, patch: int) -> dict[str, Tensor]:
    """Return the branches in diffusers' format: {"transformer.<layer>.lora_A.weight": tensor}.

    ComfyUI reads the same names for FLUX, Qwen-Image and Z-Image. alpha / rank is multiplied into
    B, since a file without alpha means a factor of 1 to both.
    """
    names, layout, tensors = (
        module_names(generator.config, patch),
        Layout(generator.config, patch),
        {},
    )
    for name, linear in layers_with_lora(generator).items():
        for part, A, B in linear.lora.pairs():
            A, B = reordered(layout, name, A, B)
            their = f"transformer.{names[name][part]}"
            tensors[f"{their}.lora_A.weight"] = A
            tensors[f"{their}.lora_B.weight"] = linear.lora.scale * B
    return tensors


def save_lora(
    generator: Generator,
    folder: Path | str,
    *,
    patch: int,
    origin: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the branches as a file for the load_lora_weights of diffusers' pipelines.

    Args:
        generator: the generator.
        folder: folder of the file, whose name is FILE.
        patch: the VAE's patch.
        origin: where the weights come from, kept in the file's metadata as JSON.
        dtype: dtype of the file. Defaults to that of the weights.

    Returns:
        The file.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(
        diffusers_lora(generator, patch), path, dtype, metadata={"iomm": json.dumps(origin or {})}
    )
    return path


@torch.no_grad()
def checksum(
    model: nn.Module, part: int = 1 << 24, gather: Callable[[Tensor], Any] | None = None
) -> str:
    """Return a checksum of all frozen weights: 16 hex digits.

    It is the same on every device and in every dtype that holds bfloat16, to which the weights are
    rounded. `part` numbers are summed at once. `gather` is called with each weight before it is
    read.
    """
    facts = []
    for name, tensor in sorted(frozen_weights(model).items()):
        if gather is not None:
            gather(tensor)
        sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
        for start, piece in enumerate(tensor.flatten().split(part)):
            bits = piece.to(torch.bfloat16).view(torch.int16).long()
            places = torch.arange(len(bits), device=bits.device) + start * part
            sums += torch.stack((bits.sum(), (bits * (places % 65521 + 1)).sum()))
        facts.append([name, list(tensor.shape), sums])
    text = json.dumps([[name, shape, sums.tolist()] for name, shape, sums in facts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
