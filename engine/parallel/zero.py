"""Ranks and ZeRO: how processes find each other and how weights, gradients and optimizer state are split.

The only door to DeepSpeed, with engine/launch.py. Generator and adapter go in; frozen parts stay outside.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from iomm.config import InputError
from iomm.engine.parallel.optim import STATE, Matrix, adamw_multi_tensor, adamw_torch
from iomm.engine.parallel.zero_layouts import Replicated, Stage3, Stages1And2
from iomm.layers import FusedLinear


def adamw_backend(name, device):
    """ "torch" or "apex" -> what does AdamW's update. Raises InputError if it cannot run here, and says what to install."""
    if name == "torch":
        return adamw_torch
    if device.type != "cuda":
        raise InputError("optim.adamw=apex needs a GPU: leave optim.adamw=torch")
    try:
        # The compiled part of NVIDIA's apex; PyPI's `apex` has none.
        from amp_C import multi_tensor_adam
    except ImportError as error:
        raise InputError(
            f"optim.adamw=apex: no NVIDIA apex with CUDA extensions here ({error}); build it from "
            "github.com/NVIDIA/apex (never `pip install apex`), or set optim.adamw=torch"
        ) from None
    return adamw_multi_tensor(multi_tensor_adam)


class Sharded:
    """A module whose optimizer state (stage 1), gradients (2) and parameters (3) are split over the ranks by ZeRO; at stage
    0 every rank has all of it.

    Masters are fp32 and so is gradient accumulation. `places` names the pieces of parameters that this rank holds.
    """

    def __init__(self, module, make_optimizer, *, config, ranks, leaves, micro_batch, accumulation):
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.size, stage = ranks.size, config.zero.stage
        config.zero.check_ranks(ranks.size)
        # Our own; DeepSpeed wraps it.
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
            self.layout = (Stage3 if stage == 3 else Stages1And2)(
                module, self.engine.optimizer, ranks.rank
            )
        self.masters, self.places = self.layout.masters, self.layout.places
        self.kinds = [
            self.optimizer.param_groups[group]["kind"] for group in self.layout.param_group
        ]
        self.bind_matrices(module, ranks, whole=stage == 0)

    def bind_matrices(self, module, ranks, whole):
        """Tells the optimizer where the pieces of each matrix lie on all ranks, or on this one if each has them whole."""
        if "muon" not in self.kinds:
            return
        fused = {
            f"{name}.weight": m.parts
            for name, m in module.named_modules()
            if isinstance(m, FusedLinear)
        }
        everywhere = [self.places] if whole else ranks.all(self.places)
        matrices = {flat: [] for flat, kind in zip(self.masters, self.kinds) if kind == "muon"}
        for name, shape in self.shapes.items():
            places = [places.get(name) for places in everywhere]
            flat = self.masters[next(place.group for place in places if place)]
            if flat in matrices:
                cuts = tuple((place.offset, place.numel) if place else (0, 0) for place in places)
                matrices[flat].append(
                    Matrix(shape=shape, parts=fused.get(name, shape[:1]), cuts=cuts)
                )
        self.optimizer.bind(matrices, ranks.rank, ranks.size, replicated=whole)

    def slots(self):
        """{slot: [flat tensor, or None, per master]}: masters, and what the optimizer keeps of each."""
        states = [
            self.optimizer.fresh_state(flat, kind) for flat, kind in zip(self.masters, self.kinds)
        ]
        names = sorted({name for kind in self.kinds for name in STATE[kind]})
        return {
            "master": self.masters,
            **{name: [state.get(name) for state in states] for name in names},
        }

    @property
    def optimizer_step(self):
        state = self.optimizer.state.get(self.masters[0])
        return int(state["step"]) if state else 0

    @torch.no_grad()
    def finish_restore(self, optimizer_step):
        """Call after the slots' tensors were overwritten: hands the masters to the working copies."""
        for flat in self.masters:
            self.optimizer.state[flat]["step"].fill_(optimizer_step)
        self.layout.refresh()

    @contextmanager
    def with_weights(self, flats):
        """The module, for forward passes without gradient between two steps, on all ranks alike. Its weights are `flats`
        (shaped like the masters), or the masters where there are none; afterwards all is as it was, to the bit.
        """
        self.layout.leave_training()
        self.exchange(flats)
        try:
            with torch.no_grad():
                yield self.engine.module
        finally:
            self.exchange(flats)

    @torch.no_grad()
    def exchange(self, flats, part=1 << 24):
        """Swaps masters and flats, 64 MiB at a time, and hands the new masters over."""
        for master, flat in zip(self.masters, flats):
            for mine, theirs in zip(master.detach().split(part), flat.split(part)):
                kept = mine.clone()
                mine.copy_(theirs)
                theirs.copy_(kept)
        self.layout.refresh()

    def set_lr(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def module(self):
        """What is sharded, for calls that touch none of its parameters; all others go through __call__."""
        return self.engine.module

    def __call__(self, *args):
        return self.engine(*args)

    def backward(self, loss):
        # Divides by the accumulation steps.
        self.engine.backward(loss)

    @property
    def last_micro_batch(self):
        """Whether the pass under way is the last before the optimizer's step."""
        return self.engine.is_gradient_accumulation_boundary()

    def step(self):
        """Acts only at the last micro-batch. Returns whether weights changed: a gradient, master or moment that is not
        finite on any rank makes every rank skip.
        """
        mark = self._poison_if_nonfinite() if self.last_micro_batch else None
        self.engine.step()
        applied = self.engine.was_step_applied()
        # DeepSpeed keeps the buffer, and not every parameter has a gradient each time.
        if mark is not None and not applied:
            mark.zero_()
        return applied

    @torch.no_grad()
    def _poison_if_nonfinite(self):
        """Makes one gradient of every rank NaN if a gradient, master or moment of any is not finite, so that DeepSpeed, which
        looks at the norm of gradients only, skips the step; returns that gradient. All ranks, since at stages 0 and 1 each
        takes the norm of the summed gradient by itself. No wait for the GPU; one pass over gradients and optimizer state.
        """
        gradients = self.layout.gradients()
        kept = gradients + [
            flat for flats in self.slots().values() for flat in flats if flat is not None
        ]
        if kept[0].is_cuda:
            ends = torch._foreach_norm(kept, ord=float("inf"))
        else:
            # a CPU takes a twelfth of the time for the least and the largest value
            ends = [end for tensor in kept for end in tensor.aminmax()]
        sound = torch.stack(ends).isfinite().all().float()
        if self.size > 1:
            dist.all_reduce(sound, op=dist.ReduceOp.MIN)
        return gradients[0].view(-1)[:1].mul_(torch.where(sound > 0, 1.0, float("nan")))

    def grad_norm(self):
        """Global norm of the last step's gradient before clipping, or None after a skipped step."""
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else None


def reduce_dtype(config):
    """Type in which gradients travel."""
    return (
        torch.float32
        if "fp32" in (config.precision, config.zero.reduce_precision)
        else torch.bfloat16
    )


def deepspeed_config(config, device, micro_batch, accumulation):
    """Everything that has a default is written out: DeepSpeed's own defaults clip at 1.0 and accumulate in bf16."""
    zero = config.zero
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        # Immediate: at stage 1 every bf16 gradient is added to its fp32 sum as soon as it is there, and freed.
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
            # What lies between a block's forward and backward pass is counted on the way there and back.
            "stage3_max_reuse_distance": 2 * zero.max_live_parameters,
            "zero_hpz_partition_size": zero.hpz_partition_size,
            # Its own linear, put into torch.nn.functional for the whole process, keeps no gathered weight
            # for the backward pass. A compiled block keeps none either (tests/engine/test_compile.py), and on a
            # CPU, where memory is not what is short, a step of the demo takes 0.65 s instead of 0.90.
            "memory_efficient_linear": device.type == "cuda" and not config.train.compiled(device),
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It waits for the device in every forward and step, to print nothing.
        "timers": {"throughput": {"enabled": False}},
    }
