"""Ranks: how processes find each other, and what they do together beside training."""

import logging
import os
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from iomm.config import InputError
from iomm.engine.parallel.cpu_ranks import free_port


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others. `control_group` is a gloo group that waits days: for work that only rank 0 does."""

    rank: int
    local_rank: int
    local_size: int
    size: int
    device: torch.device
    control_group: object

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
        dist.broadcast_object_list(outcome, src=0, group=self.control_group)
        if outcome[1] is not None:
            raise InputError(outcome[1])
        return outcome[0]

    def all(self, value):
        """[value of rank 0, value of rank 1, ...], small Python objects, on every rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def with_own_group(self):
        """The same ranks in a group of their own, for a thread whose collectives must not meet those of the others."""
        return replace(self, control_group=dist.new_group(backend="gloo", timeout=timedelta(days=7)))


def take_device(local_rank=None):
    """(local rank, its device), made the current one: call it before anything opens a context, which would be on GPU 0.
    Raises InputError, on all ranks of a machine that has more of them than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank or 0))
    if not torch.cuda.is_available():
        return local_rank, torch.device("cpu")
    ranks = max(
        local_rank + 1, int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
    )
    if ranks > torch.cuda.device_count():
        raise InputError(
            f"{ranks} ranks on a machine that shows {torch.cuda.device_count()} GPU(s): start fewer, with --num_gpus or "
            "--nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    return local_rank, torch.device("cuda", local_rank)


def start(timeout_s, local_rank=None):
    """Joins the other ranks (gloo without a GPU, NCCL with) and returns this process's Ranks.

    A collective that takes longer than timeout_s ends the run with an error instead of waiting for ever.
    """
    import deepspeed
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # At stage 1 it prints memory a dozen times at the start, each after a garbage collection, and cannot be told not to.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # It calls collectives by names that torch 2.13 announces to rename; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its shared-memory op is compiled at the first start, and a kill during that leaves a lock that stops every later
    # start. Plain gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    local_rank, device = take_device(local_rank)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
    )
    return Ranks(
        rank=dist.get_rank(),
        local_rank=local_rank,
        size=dist.get_world_size(),
        device=device,
        local_size=int(
            os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        ),
        control_group=dist.new_group(backend="gloo", timeout=timedelta(days=7)),
    )


def stop():
    """Leaves the process group; without it a rank that ends early can leave the others waiting."""
    if dist.is_initialized():
        dist.destroy_process_group()
