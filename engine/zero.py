"""Ranks and ZeRO-3: how processes find each other and how weights, gradients and optimizer state are split.

The only door to DeepSpeed, with engine/launch.py. Generator and adapter go in; frozen parts stay outside."""

import logging
import os
import socket
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from iomm.config import InputError
from iomm.engine.optim import STATE, Piece
from iomm.layers import FusedLinear


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others. `patient` is a gloo group that waits days: for work that only rank 0 does."""

    rank: int
    local_rank: int
    local_size: int
    size: int
    device: torch.device
    patient: object

    @property
    def first(self):
        return self.rank == 0

    def on_first(self, work):
        """Runs work() on rank 0 alone; every rank gets its result, or raises the InputError that it raised."""
        outcome = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except InputError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0, group=self.patient)
        if outcome[1] is not None:
            raise InputError(outcome[1])
        return outcome[0]

    def all(self, value):
        """[value of rank 0, value of rank 1, ...], small Python objects, on every rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def apart(self):
        """The same ranks in a group of their own, for a thread whose collectives must not meet those of the others."""
        return replace(self, patient=dist.new_group(backend="gloo", timeout=timedelta(days=7)))


def start(timeout_s, local_rank=None):
    """Joins the other ranks (gloo without a GPU, NCCL with) and returns this process's Ranks.

    A collective that takes longer than timeout_s ends the run with an error instead of waiting for ever."""
    import deepspeed
    from deepspeed.utils import logger
    logger.setLevel(logging.WARNING)
    # It calls collectives by names that torch 2.13 announces to rename; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its shared-memory op is compiled at the first start, and a kill during that leaves a lock that stops every later
    # start. Plain gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank or 0))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; "
                         "start fewer ranks with --num_gpus")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s),
                               verbose=False)
    return Ranks(rank=dist.get_rank(), local_rank=local_rank, size=dist.get_world_size(), device=device,
                 local_size=int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))),
                 patient=dist.new_group(backend="gloo", timeout=timedelta(days=7)))


def stop():
    """Leaves the process group; without it a rank that ends early can leave the others waiting."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Sharded:
    """A module whose parameters, gradients and optimizer state are split over the ranks by ZeRO-3.

    Masters are fp32 and so is gradient accumulation. Each parameter is padded to a multiple of the number of ranks and
    cut into equal pieces; `views` names this rank's pieces."""

    def __init__(self, module, make_optimizer, *, config, ranks, leaves, micro_batch, accumulation):
        import deepspeed
        if leaves:
            deepspeed.utils.set_z3_leaf_modules(module, list(leaves))
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=make_optimizer(module),
            config=deepspeed_config(config, ranks.device, micro_batch, accumulation))
        self.rank, self.size = ranks.rank, ranks.size
        parts = {f"{name}.weight": m.parts for name, m in module.named_modules() if isinstance(m, FusedLinear)}
        pieces = {flat: [] for flat, kind in zip(self.masters, self.kinds) if kind == "muon"}
        for name, (group, offset, numel) in self.places().items():
            if self.masters[group] in pieces:
                shape = self.shapes[name]
                pieces[self.masters[group]].append(
                    Piece(shape=shape, parts=parts.get(name, shape[:1]), offset=offset, numel=numel))
        self.optimizer.bind(pieces, ranks.rank, ranks.size)

    @property
    def optimizer(self):
        """Our own optimizer, inside DeepSpeed's."""
        return self.engine.optimizer.optimizer

    @property
    def kinds(self):
        """"adamw" or "muon" of every sub-group."""
        group_of = self.engine.optimizer.sub_group_to_group_id
        return [self.optimizer.param_groups[group_of[i]]["kind"] for i in range(len(self.masters))]

    @property
    def masters(self):
        """fp32 weights of this rank, one flat tensor per sub-group."""
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def slots(self):
        """{slot: [flat tensor, or None, per sub-group]}: masters, and what the optimizer keeps of each."""
        states = [self.optimizer.fresh_state(flat, kind) for flat, kind in zip(self.masters, self.kinds)]
        names = sorted({name for kind in self.kinds for name in STATE[kind]})
        return {"master": self.masters, **{name: [state.get(name) for state in states] for name in names}}

    @property
    def optimizer_step(self):
        state = self.optimizer.state.get(self.masters[0])
        return int(state["step"]) if state else 0

    def places(self):
        """{parameter name: (sub-group, offset, numel) of this rank's padded piece}."""
        optimizer = self.engine.optimizer
        return {name: tuple(optimizer.grad_position[optimizer.get_param_id(parameter)])
                for name, parameter in self.engine.module.named_parameters()}

    def views(self, flats):
        """Flat tensors shaped like the masters -> {parameter name: this rank's padded piece, one-dimensional}; parameters
        of sub-groups that are None have none."""
        return {name: flats[group].detach().narrow(0, offset, numel)
                for name, (group, offset, numel) in self.places().items() if flats[group] is not None}

    @torch.no_grad()
    def restored(self, optimizer_step):
        """Call after the slots' tensors were overwritten: hands the masters to the working copies."""
        optimizer = self.engine.optimizer
        for i, flat in enumerate(self.masters):
            self.optimizer.state[flat]["step"].fill_(optimizer_step)
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:      # small parameters stay gathered: gather them anew
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def set_lr(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def __call__(self, *args):
        return self.engine(*args)

    def backward(self, loss):
        self.engine.backward(loss)               # divides by the accumulation steps

    @property
    def last_micro_batch(self):
        """Whether the pass under way is the last before the optimizer's step."""
        return self.engine.is_gradient_accumulation_boundary()

    def step(self):
        """Acts only at the last micro-batch. Returns whether weights changed: a gradient, master or moment that is not
        finite on any rank makes every rank skip."""
        if self.last_micro_batch:
            self.doubt()
        self.engine.step()
        return self.engine.was_step_applied()

    @torch.no_grad()
    def doubt(self):
        """Makes one gradient NaN if a master or moment of this rank is not finite, so that DeepSpeed, which looks at the
        norm of gradients only, skips the step everywhere. No wait for the GPU, one pass over the optimizer's state."""
        kept = [flat for flats in self.slots().values() for flat in flats if flat is not None]
        sound = torch.stack(torch._foreach_norm(kept, ord=float("inf"))).isfinite().all()
        gradient = next(g for g in self.engine.optimizer.averaged_gradients[0] if g is not None)
        gradient.view(-1)[:1].mul_(torch.where(sound, 1.0, float("nan")))

    def grad_norm(self):
        """Global norm of the last step's gradient before clipping, or None after a skipped step."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)


def deepspeed_config(config, device, micro_batch, accumulation):
    """Everything that has a default is written out: DeepSpeed's own defaults clip at 1.0 and accumulate in bf16."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.zero.stage, "overlap_comm": device.type == "cuda",
                              "contiguous_gradients": True,
                              # Its own linear keeps no gathered weight for the backward pass; on CPU, where memory is
                              # not what is short, a step of the demo takes 0.65 s instead of 0.90.
                              "memory_efficient_linear": device.type == "cuda"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
