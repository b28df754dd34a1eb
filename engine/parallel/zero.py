"""Shard weights, gradients and optimizer state over the ranks with ZeRO.

Only this module, ranks.py and engine/launch.py import DeepSpeed. The generator and the adapter are
sharded; frozen parts are not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from iomm.config import InputError
from iomm.engine.config import RunConfig
from iomm.engine.parallel.optim import (
    STATE,
    AdamwBackend,
    Matrix,
    ShardedOptimizer,
    adamw_multi_tensor,
    adamw_torch,
)
from iomm.engine.parallel.ranks import Ranks
from iomm.engine.parallel.zero_layouts import Replicated, Stage3, Stages1And2


def adamw_backend(name: str, device: torch.device) -> AdamwBackend:
    """Return the function that does AdamW's update, by its name "torch" or "apex".

    Raises:
        InputError: It cannot run here. The message has the package to install.
    """
    if name == "torch":
        return adamw_torch
    if device.type != "cuda":
        raise InputError("optim.adamw=apex needs a GPU: set optim.adamw=torch")
    try:
        # The compiled part of NVIDIA's apex. PyPI's `apex` is another package without it.
        from amp_C import multi_tensor_adam
    except ImportError as error:
        raise InputError(
            f"optim.adamw=apex needs NVIDIA apex with CUDA extensions ({error}): build it from "
            "github.com/NVIDIA/apex (not `pip install apex`), or set optim.adamw=torch"
        ) from None
    return adamw_multi_tensor(multi_tensor_adam)


class Sharded:
    """Train a module whose state is sharded over the ranks by ZeRO.

    ZeRO shards the optimizer state (stage 1), gradients (2) and parameters (3). At stage 0 every
    rank has all of them. Masters and gradient accumulation are fp32. `places` maps a parameter's
    name to the piece of it that this rank holds.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: Callable[[nn.Module], ShardedOptimizer],
        *,
        config: RunConfig,
        ranks: Ranks,
        leaves: Sequence[type[nn.Module]],
        micro_batch: int,
        accumulation: int,
    ) -> None:
        """Shard the module, on all ranks together.

        Args:
            module: The model, with all of its trained parameters.
            make_optimizer: Return the optimizer of the module.
            config: The run's config.
            ranks: All ranks.
            leaves: Classes of modules that stage 3 gathers whole.
            micro_batch: Samples per rank and forward pass.
            accumulation: Micro-batches per step.
        """
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.size = ranks.size
        stage = config.zero.stage
        config.zero.check_ranks(ranks.size)
        # DeepSpeed wraps this optimizer.
        self.optimizer = make_optimizer(module)
        if stage == 0:
            self.engine = self.layout = Replicated(
                module,
                self.optimizer,
                rank=ranks.rank,
                size=ranks.size,
                clip=config.optim.clip,
                accumulation=accumulation,
                dtype=config.dtype,
                reduce_dtype=reduce_dtype(config),
            )
        else:
            import deepspeed

            if leaves and stage == 3:
                deepspeed.utils.set_z3_leaf_modules(module, list(leaves))
            self.engine, _, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizer,
                config=deepspeed_config(config, ranks.device, micro_batch, accumulation),
            )
            spare_frozen_linears()
            layout = Stage3 if stage == 3 else Stages1And2
            self.layout = layout(module, self.engine.optimizer, ranks.rank)
        self.masters: list[Tensor] = self.layout.masters
        self.places = self.layout.places
        self.kinds = [
            self.optimizer.param_groups[group]["kind"] for group in self.layout.param_group
        ]
        self.bind_matrices(module, ranks, whole=stage == 0)

    def bind_matrices(self, module: nn.Module, ranks: Ranks, whole: bool) -> None:
        """Give the optimizer the location of every piece of each matrix.

        On all ranks, or on this rank only if `whole`, where each rank has whole matrices.
        """
        if "muon" not in self.kinds:
            return
        fused = {
            f"{name}.weight": m.parts
            for name, m in module.named_modules()
            if isinstance(m, nn.Linear) and hasattr(m, "parts")
        }
        everywhere = [self.places] if whole else ranks.all(self.places)
        matrices = {
            flat: [] for flat, kind in zip(self.masters, self.kinds, strict=True) if kind == "muon"
        }
        for name, shape in self.shapes.items():
            places = [places.get(name) for places in everywhere]
            flat = self.masters[next(place.group for place in places if place)]
            if flat in matrices:
                cuts = tuple((place.offset, place.numel) if place else (0, 0) for place in places)
                matrices[flat].append(
                    Matrix(shape=shape, parts=fused.get(name, shape[:1]), cuts=cuts)
                )
        self.optimizer.bind(matrices, ranks.rank, ranks.size, replicated=whole)

    def slots(self) -> dict[str, list[Tensor | None]]:
        """Return the masters and the optimizer state as {slot: [tensor or None, per master]}."""
        states = [
            self.optimizer.fresh_state(flat, kind)
            for flat, kind in zip(self.masters, self.kinds, strict=True)
        ]
        names = sorted({name for kind in self.kinds for name in STATE[kind]})
        return {
            "master": self.masters,
            **{name: [state.get(name) for state in states] for name in names},
        }

    @property
    def optimizer_step(self) -> int:
        """Return the number of steps that the optimizer has taken."""
        state = self.optimizer.state.get(self.masters[0])
        return int(state["step"]) if state else 0

    @torch.no_grad()
    def finish_restore(self, optimizer_step: int) -> None:
        """Copy the masters to the working weights and set the step count.

        Call it after the tensors of slots() were overwritten.
        """
        for flat in self.masters:
            self.optimizer.state[flat]["step"].fill_(optimizer_step)
        self.layout.refresh()

    @contextmanager
    def with_weights(self, flats: list[Tensor]) -> Iterator[nn.Module]:
        """Yield the module for forward passes without gradient between two steps.

        Enter it on all ranks together. The module's weights are `flats` (shaped like the masters),
        or the masters if `flats` is empty. On exit all state is restored bit by bit.
        """
        self.layout.leave_training()
        self.exchange(flats)
        try:
            with torch.no_grad():
                yield self.engine.module
        finally:
            self.exchange(flats)

    @torch.no_grad()
    def exchange(self, flats: list[Tensor], part: int = 1 << 24) -> None:
        """Swap masters and flats, 64 MiB at a time, and refresh the working weights."""
        # flats is empty in a run without an average.
        for master, flat in zip(self.masters, flats, strict=False):
            pieces = zip(master.detach().split(part), flat.split(part), strict=True)
            for master_piece, flat_piece in pieces:
                kept = master_piece.clone()
                master_piece.copy_(flat_piece)
                flat_piece.copy_(kept)
        self.layout.refresh()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all parameter groups."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def module(self) -> nn.Module:
        """Return the sharded module, for calls that use none of its parameters.

        All other calls go through __call__.
        """
        return self.engine.module

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, divided by the number of accumulation steps."""
        self.engine.backward(loss)

    @property
    def last_micro_batch(self) -> bool:
        """Return whether the current micro-batch is the last one before the optimizer's step."""
        return self.engine.is_gradient_accumulation_boundary()

    def step(self) -> bool:
        """Take an optimizer step after the last micro-batch, and return whether weights changed.

        Does nothing after the other micro-batches. If a gradient, master or moment is not finite on
        any rank, every rank skips the step.
        """
        mark = self._poison_if_nonfinite() if self.last_micro_batch else None
        self.engine.step()
        applied = self.engine.was_step_applied()
        # DeepSpeed reuses the buffer, and not every parameter has a gradient in each step.
        if mark is not None and not applied:
            mark.zero_()
        return applied

    @torch.no_grad()
    def _poison_if_nonfinite(self) -> Tensor:
        """Make one gradient of every rank NaN if any gradient, master or moment is not finite.

        DeepSpeed checks only the norm of the gradients, and the NaN makes it skip the step. Every
        rank needs one, because at stages 0 and 1 each rank computes the norm of the summed gradient
        itself. Takes one pass over gradients and optimizer state, and does not sync with the GPU.
        Returns that gradient, of shape (1,).
        """
        gradients = self.layout.gradients()
        tensors = gradients + [
            flat for flats in self.slots().values() for flat in flats if flat is not None
        ]
        if tensors[0].is_cuda:
            extremes = torch._foreach_norm(tensors, ord=float("inf"))
        else:
            # On a CPU, the minimum and maximum take a twelfth of the time of the norm.
            extremes = [extreme for tensor in tensors for extreme in tensor.aminmax()]
        finite = torch.stack(extremes).isfinite().all().float()
        if self.size > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return gradients[0].view(-1)[:1].mul_(torch.where(finite > 0, 1.0, float("nan")))

    def grad_norm(self) -> Tensor | float | None:
        """Return the gradient norm of the last step before clipping, or None if skipped.

        A tensor is still on the device.
        """
        return self.engine.get_global_grad_norm() if self.engine.was_step_applied() else None


def reduce_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype in which gradients are reduced over ranks."""
    return (
        torch.float32
        if "fp32" in (config.precision, config.zero.reduce_precision)
        else torch.bfloat16
    )


def spare_frozen_linears() -> None:
    """Let frozen linears use PyTorch's function where DeepSpeed has replaced it.

    DeepSpeed's function keeps the input of every linear for the backward pass, also where the
    weight needs no gradient: 4 GiB in the MLLM of IOMM-B with 16 images.
    """
    replaced, original = functional.linear, torch._C._nn.linear
    if replaced.__module__ != "deepspeed.runtime.zero.linear":
        return

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (replaced if weight.requires_grad else original)(input, weight, bias)

    functional.linear = linear


def deepspeed_config(
    config: RunConfig, device: torch.device, micro_batch: int, accumulation: int
) -> dict[str, Any]:
    """Return DeepSpeed's config with every default set explicitly.

    DeepSpeed's own defaults clip at 1.0 and accumulate in bf16.
    """
    zero = config.zero
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        # With immediate updates, stage 1 adds every bf16 gradient to its fp32 sum and frees it as
        # soon as it exists.
        "bf16": {
            "enabled": config.dtype == torch.bfloat16,
            "check_grad_overflow": True,
            "immediate_grad_update": True,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32" if reduce_dtype(config) == torch.float32 else "bf16",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": device.type == "cuda"
            if zero.overlap_comm is None
            else zero.overlap_comm,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "allgather_bucket_size": zero.allgather_bucket_size,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            # Parameters between a block's forward and backward pass count once in each direction.
            "stage3_max_reuse_distance": 2 * zero.max_live_parameters,
            "zero_hpz_partition_size": zero.hpz_partition_size,
            # DeepSpeed's linear, patched into torch.nn.functional for the whole process, keeps no
            # gathered weight for the backward pass. A compiled block keeps none either
            # (tests/engine/test_compile.py). Memory is not the limit on a CPU, where a step of the
            # demo takes 0.65 s without it and 0.90 s with it.
            "memory_efficient_linear": device.type == "cuda" and not config.train.compiled(device),
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # This timer syncs with the device in every forward pass and step, and prints nothing here.
        "timers": {"throughput": {"enabled": False}},
    }
