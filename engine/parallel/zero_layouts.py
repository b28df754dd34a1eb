"""Layouts of the fp32 masters at each ZeRO stage.

A layout maps each piece of a parameter that a rank holds to its position in the masters.
Stage 3 cuts every parameter into equal pieces, one per rank. Stages 1 and 2 concatenate the
parameters of a group and cut the result, therefore a rank's piece of a parameter can start and end
anywhere. At stage 0 every rank holds everything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Place:
    """Locate a rank's piece of a parameter.

    Values start ... start + numel - 1 of the flattened parameter are at `offset` in the master with
    index `group`. `written` is set on the rank that writes them into checkpoints.
    """

    group: int
    offset: int
    numel: int
    start: int
    written: bool = True


class Stage3:
    """Map the masters of DeepSpeed's DeepSpeedZeroOptimizer_Stage3."""

    def __init__(self, module: nn.Module, optimizer: Any, rank: int) -> None:
        self.optimizer = optimizer
        self.places: dict[str, Place] = {}
        self.masters: list[Tensor] = optimizer.fp32_partitioned_groups_flat
        # The parameter group of every master. DeepSpeed cuts a group of which a rank holds over a
        # billion values into several masters.
        self.param_group = [optimizer.sub_group_to_group_id[i] for i in range(len(self.masters))]
        for name, parameter in module.named_parameters():
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * padded
            numel = min(max(parameter.ds_numel - start, 0), padded)
            # Padding is uninitialized memory, and a NaN in it would look like a corrupt master.
            self.masters[group].detach()[offset + numel : offset + padded].zero_()
            if numel:
                self.places[name] = Place(group=group, offset=offset, numel=numel, start=start)

    def gradients(self) -> list[Tensor]:
        """Return this rank's gradients, valid between the last backward pass and the step."""
        return [
            g
            for group in self.optimizer.averaged_gradients.values()
            for g in group
            if g is not None
        ]

    def refresh(self) -> None:
        """Copy overwritten masters to the working weights."""
        # Parameters that are still gathered have the old values.
        self.optimizer._partition_all_parameters()
        for i in range(len(self.masters)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
        # The second copy of hierarchical partitioning is out of date as well.
        self.optimizer.invalidate_secondary_tensor()
        # Small parameters stay gathered and must be gathered again.
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        # DeepSpeed gathers on a separate stream and does not synchronize it.
        if self.masters[0].is_cuda:
            torch.cuda.current_stream().synchronize()

    def leave_training(self) -> None:
        """Prepare for forward passes outside a training step.

        Drops DeepSpeed's recorded order of modules, which drives its prefetching. These passes then
        neither follow nor change it. The next two steps record it again and fetch each block on
        demand.
        """
        coordinator = self.optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


class Stages1And2:
    """Map the masters of DeepSpeed's DeepSpeedZeroOptimizer or BF16_Optimizer.

    DeepSpeed uses BF16_Optimizer at stage 1 with bf16.
    """

    def __init__(self, module: nn.Module, optimizer: Any, rank: int) -> None:
        self.optimizer = optimizer
        self.bf16_optimizer = hasattr(optimizer, "fp32_groups_flat_partition")
        self.masters: list[Tensor] = (
            optimizer.fp32_groups_flat_partition
            if self.bf16_optimizer
            else optimizer.single_partition_of_fp32_groups
        )
        self.param_group = range(len(self.masters))
        held = {
            name: p._hp_mapping
            for name, p in module.named_parameters()
            if p._hp_mapping is not None
        }
        self.places: dict[str, Place] = {
            name: Place(
                group=m.param_group_index,
                offset=m.hp_fragment_address.start,
                numel=m.hp_fragment_address.numel,
                start=m.lp_fragment_address.start,
            )
            for name, m in held.items()
        }

    def gradients(self) -> list[Tensor]:
        """Return this rank's gradients, valid between the last backward pass and the step.

        They are the tensors over which DeepSpeed computes the gradient norm.
        """
        if self.bf16_optimizer:
            groups = zip(
                self.optimizer.fp32_groups_gradients,
                self.optimizer.fp32_groups_has_gradients,
                strict=True,
            )
            return [
                g
                for gradients, present in groups
                for g, has_gradient in zip(gradients, present, strict=True)
                if has_gradient
            ]
        return [g for group in self.optimizer.averaged_gradients.values() for g in group]

    def refresh(self) -> None:
        """Copy overwritten masters to the working weights."""
        self.optimizer.update_lp_params()

    def leave_training(self) -> None:
        """Do nothing: weights are whole on every rank, and any pass may follow."""


def accumulate_into(sums: Tensor) -> Callable[[nn.Parameter], None]:
    """Return a hook that adds a parameter's gradient to fp32 sums and frees it.

    A `.grad` in fp32 on bf16 weights would prevent torch.compile from tracing their block.
    """

    def add(p: nn.Parameter) -> None:
        sums.add_(p.grad)
        p.grad = None

    return add


class Replicated:
    """Train at stage 0, with masters, moments and fp32 gradients whole on every rank.

    Takes the place of both DeepSpeed's engine and the layout. DeepSpeed's own stage 0 rejects bf16
    weights with fp32 accumulation and reports no gradient norm. Gradients are reduced once per
    step, after the backward pass, without overlap.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rank: int,
        size: int,
        dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        clip: float,
        accumulation: int,
    ) -> None:
        """Replace the optimizer's parameters by flat fp32 masters, one per parameter group.

        Args:
            module: The model.
            optimizer: Its optimizer, over the model's parameters.
            rank: This rank.
            size: Number of ranks.
            dtype: The dtype of the working weights.
            reduce_dtype: The dtype in which gradients are reduced.
            clip: Maximum norm of the gradient. 0 does not clip.
            accumulation: Micro-batches per step.
        """
        self.module = module.to(dtype)
        self.optimizer = optimizer
        self.size = size
        self.reduce_dtype = reduce_dtype
        self.clip = clip
        self.accumulation = accumulation
        self.passes = 0
        self.applied = False
        self.norm: Tensor | None = None
        self.masters: list[Tensor] = []
        self.sums: list[Tensor] = []
        # (working weight, view of its master) of every parameter.
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.places: dict[str, Place] = {}
        self.param_group = range(len(optimizer.param_groups))
        names = {p: (i, name) for i, (name, p) in enumerate(module.named_parameters())}
        for group in optimizer.param_groups:
            parameters, offset = group["params"], 0
            master = torch.cat([p.detach().float().flatten() for p in parameters]).requires_grad_()
            sums = torch.zeros_like(master, requires_grad=False)
            numels = [p.numel() for p in parameters]
            weights_of, gradients_of = master.detach().split(numels), sums.detach().split(numels)
            for p, weights, gradient in zip(parameters, weights_of, gradients_of, strict=True):
                i, name = names[p]
                self.places[name] = Place(
                    group=len(self.masters),
                    offset=offset,
                    numel=p.numel(),
                    start=0,
                    written=i % size == rank,
                )
                self.copies.append((p.detach(), weights.view_as(p)))
                p.register_post_accumulate_grad_hook(accumulate_into(gradient.view_as(p)))
                offset += p.numel()
            self.masters.append(master)
            self.sums.append(sums)
            master.grad, group["params"] = sums, [master]

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, divided by the number of accumulation steps."""
        (loss / self.accumulation).backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the current micro-batch is the last one before the optimizer's step."""
        return (self.passes + 1) % self.accumulation == 0

    @torch.no_grad()
    def step(self) -> None:
        """Reduce, clip and apply the gradients after the last micro-batch."""
        last = self.is_gradient_accumulation_boundary()
        self.applied = False
        self.passes += 1
        if not last:
            return
        if self.size > 1:
            for sums in self.sums:
                message = sums.to(self.reduce_dtype)
                dist.all_reduce(message)
                sums.copy_(message).div_(self.size)
        norm = torch.stack(torch._foreach_norm(self.sums)).norm()
        # Syncs with the GPU, as DeepSpeed does.
        self.applied = bool(norm.isfinite())
        if self.applied:
            self.norm = norm
            if self.clip:
                torch._foreach_div_(self.sums, ((norm + 1e-6) / self.clip).clamp(min=1.0))
            self.optimizer.step()
            self.refresh()
        torch._foreach_zero_(self.sums)

    def was_step_applied(self) -> bool:
        """Return whether the last step changed weights."""
        return self.applied

    def get_global_grad_norm(self) -> Tensor | None:
        """Return the gradient norm of the last applied step, before clipping."""
        return self.norm

    def gradients(self) -> list[Tensor]:
        """Return this rank's gradients, valid between the last backward pass and the step."""
        return self.sums

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy overwritten masters to the working weights."""
        working, masters = zip(*self.copies, strict=True)
        torch._foreach_copy_(list(working), list(masters))

    def leave_training(self) -> None:
        """Do nothing: weights are whole on every rank, and any pass may follow."""
