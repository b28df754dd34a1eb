"""How each ZeRO stage lays out fp32 masters: which piece of which parameter a rank holds, and where.

Stage 3 cuts every parameter into equal pieces, one a rank. Stages 1 and 2 lay the parameters of a group end to end and
cut that, so that a rank's piece of a parameter can begin and end anywhere. At stage 0 every rank holds everything.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Place:
    """`numel` values, from value `start` of a flattened parameter on, lie at `offset` in master number `group`.

    written: whether this rank is the one that writes them into checkpoints.
    """

    group: int
    offset: int
    numel: int
    start: int
    written: bool = True


class Stage3:
    """The masters of DeepSpeed's DeepSpeedZeroOptimizer_Stage3."""

    def __init__(self, module, optimizer, rank):
        self.optimizer, self.places = optimizer, {}
        self.masters = optimizer.fp32_partitioned_groups_flat
        # Of every master; DeepSpeed cuts a group of which a rank holds over a billion values into several.
        self.param_group = [optimizer.sub_group_to_group_id[i] for i in range(len(self.masters))]
        for name, parameter in module.named_parameters():
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * padded
            numel = min(max(parameter.ds_numel - start, 0), padded)
            # Padding is memory that nobody has written: NaN there would look like a broken master.
            self.masters[group].detach()[offset + numel : offset + padded].zero_()
            if numel:
                self.places[name] = Place(group=group, offset=offset, numel=numel, start=start)

    def gradients(self):
        """Tensors of this rank's gradient, between the last backward pass and the step."""
        return [
            g
            for group in self.optimizer.averaged_gradients.values()
            for g in group
            if g is not None
        ]

    def refresh(self):
        """Hands masters that were overwritten to the working copies."""
        # What is still gathered is of the old ones.
        self.optimizer._partition_all_parameters()
        for i in range(len(self.masters)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
        # Of hierarchical partitioning
        self.optimizer.invalidate_secondary_tensor()
        # Small ones stay gathered: gather them anew.
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        # DeepSpeed gathers on a stream that waits for nobody.
        if self.masters[0].is_cuda:
            torch.cuda.current_stream().synchronize()

    def leave_training(self):
        """Before passes that are not a training step's: drops DeepSpeed's record of the order of modules, by which it fetches
        ahead, so that they neither follow nor write it. The next two steps make it anew, and fetch each block when it is due.
        """
        coordinator = self.optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


class Stages1And2:
    """The masters of DeepSpeed's DeepSpeedZeroOptimizer, or, at stage 1 with bf16, of its BF16_Optimizer."""

    def __init__(self, module, optimizer, rank):
        self.optimizer, self.bf16_optimizer = (
            optimizer,
            hasattr(optimizer, "fp32_groups_flat_partition"),
        )
        self.masters = (
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
        self.places = {
            name: Place(
                group=m.param_group_index,
                offset=m.hp_fragment_address.start,
                numel=m.hp_fragment_address.numel,
                start=m.lp_fragment_address.start,
            )
            for name, m in held.items()
        }

    def gradients(self):
        # Those that its norm is made of.
        if self.bf16_optimizer:
            return [
                g
                for gradients, there in zip(
                    self.optimizer.fp32_groups_gradients, self.optimizer.fp32_groups_has_gradients
                )
                for g, has in zip(gradients, there)
                if has
            ]
        return [g for group in self.optimizer.averaged_gradients.values() for g in group]

    def refresh(self):
        self.optimizer.update_lp_params()

    def leave_training(self):
        """Weights are whole on every rank: any pass may come."""


def adds_into(sums):
    """Hook of a parameter: its gradient, once there, is added up in fp32 and goes. Kept as `.grad` in fp32 beside bf16 weights it
    would keep torch.compile from tracing their block.
    """

    def add(p):
        sums.add_(p.grad)
        p.grad = None

    return add


class Replicated:
    """Stage 0, engine and layout in one: masters, moments and fp32 gradients whole on every rank.

    Ours, because DeepSpeed's stage 0 refuses bf16 weights with fp32 accumulation and tells no gradient norm. Gradients
    travel once a step, after the backward pass: nothing overlaps.
    """

    def __init__(self, module, optimizer, *, rank, size, dtype, reduce_dtype, clip, accumulation):
        self.module, self.optimizer, self.size, self.reduce_dtype = (
            module.to(dtype),
            optimizer,
            size,
            reduce_dtype,
        )
        self.clip, self.accumulation, self.passes, self.applied, self.norm = (
            clip,
            accumulation,
            0,
            False,
            None,
        )
        self.masters, self.sums, self.copies, self.places = [], [], [], {}
        self.param_group = range(len(optimizer.param_groups))
        names = {p: (i, name) for i, (name, p) in enumerate(module.named_parameters())}
        for group in optimizer.param_groups:
            parameters, offset = group["params"], 0
            master = torch.cat([p.detach().float().flatten() for p in parameters]).requires_grad_()
            sums = torch.zeros_like(master, requires_grad=False)
            pieces = zip(
                *(flat.detach().split([p.numel() for p in parameters]) for flat in (master, sums))
            )
            for p, (weights, gradient) in zip(parameters, pieces):
                i, name = names[p]
                self.places[name] = Place(
                    group=len(self.masters),
                    offset=offset,
                    numel=p.numel(),
                    start=0,
                    written=i % size == rank,
                )
                self.copies.append((p.detach(), weights.view_as(p)))
                p.register_post_accumulate_grad_hook(adds_into(gradient.view_as(p)))
                offset += p.numel()
            self.masters.append(master)
            self.sums.append(sums)
            master.grad, group["params"] = sums, [master]

    def __call__(self, *args):
        return self.module(*args)

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def is_gradient_accumulation_boundary(self):
        return (self.passes + 1) % self.accumulation == 0

    @torch.no_grad()
    def step(self):
        last, self.applied = self.is_gradient_accumulation_boundary(), False
        self.passes += 1
        if not last:
            return
        if self.size > 1:
            for sums in self.sums:
                message = sums.to(self.reduce_dtype)
                dist.all_reduce(message)
                sums.copy_(message).div_(self.size)
        norm = torch.stack(torch._foreach_norm(self.sums)).norm()
        # Waits for the GPU, as DeepSpeed does.
        self.applied = bool(norm.isfinite())
        if self.applied:
            self.norm = norm
            if self.clip:
                torch._foreach_div_(self.sums, ((norm + 1e-6) / self.clip).clamp(min=1.0))
            self.optimizer.step()
            self.refresh()
        torch._foreach_zero_(self.sums)

    def was_step_applied(self):
        return self.applied

    def get_global_grad_norm(self):
        return self.norm

    def gradients(self):
        return self.sums

    @torch.no_grad()
    def refresh(self):
        torch._foreach_copy_(*map(list, zip(*self.copies)))

    def leave_training(self):
        """Weights are whole on every rank: any pass may come."""
