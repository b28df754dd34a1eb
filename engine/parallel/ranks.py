"""Ranks: how processes join, and what they do together outside training."""

import logging
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist

from iomm.config import InputError
from iomm.engine.arguments import sentence, whole_variable
from iomm.engine.parallel.cpu_ranks import free_port
from iomm.engine.resilience.watchdog import host_identity, reported_wait


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Describe this process's rank and communicate with the other ranks.

    `control_group` is a gloo group with a timeout of days, for Python objects and for work that
    only rank 0 does while the others wait.
    """

    rank: int
    local_rank: int
    local_size: int
    size: int
    device: torch.device
    control_group: dist.ProcessGroup

    @property
    def first(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Run work() on rank 0 only and return its result on every rank.

        Raises:
            InputError: On every rank, if work() raised it, or an OSError, on rank 0.
        """
        outcome = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except InputError as error:
                outcome[1] = str(error)
            except OSError as error:
                outcome[1] = sentence(error)
        dist.broadcast_object_list(outcome, src=0, group=self.control_group)
        if outcome[1] is not None:
            raise InputError(outcome[1])
        return outcome[0]

    def all(self, value: Any) -> list[Any]:
        """Return [value of rank 0, value of rank 1, ...] on every rank.

        Values are small Python objects.
        """
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def by_host(self) -> list[list[int]]:
        """Return the ranks of each host, the same lists on every rank."""
        members = {}
        for rank, host in enumerate(self.all(host_identity())):
            members.setdefault(host, []).append(rank)
        return list(members.values())

    def with_own_group(self) -> Self:
        """Return the same ranks with a new control group.

        For a thread whose collectives must not be matched with those of other threads.
        """
        return replace(
            self, control_group=dist.new_group(backend="gloo", timeout=timedelta(days=7))
        )


def take_device(local_rank: int | None = None) -> tuple[int, torch.device]:
    """Make this rank's device current and return (local rank, device).

    Call it before anything creates a CUDA context, which would be on GPU 0.

    Raises:
        InputError: The machine has more ranks than GPUs. Raised on all of its ranks.
    """
    local_rank = whole_variable("LOCAL_RANK", local_rank or 0)
    if not torch.cuda.is_available():
        return local_rank, torch.device("cpu")
    ranks = max(
        local_rank + 1, int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
    )
    if ranks > torch.cuda.device_count():
        raise InputError(
            f"{ranks} ranks on a machine with {torch.cuda.device_count()} visible GPU(s): "
            "start fewer ranks with --num_gpus or --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    return local_rank, torch.device("cuda", local_rank)


def check_variables() -> None:
    """Check the environment variables with which a launcher describes the ranks.

    Raises:
        InputError: One of them is missing or wrong.
    """
    size = whole_variable("WORLD_SIZE", 1)
    rank = whole_variable("RANK", 0)
    whole_variable("LOCAL_RANK", 0)
    missing = {"RANK", "WORLD_SIZE"} - os.environ.keys()
    if len(missing) == 1 and (rank or size > 1):
        given = f"RANK is {rank}" if "RANK" in os.environ else f"WORLD_SIZE is {size}"
        raise InputError(
            f"{missing.pop()} is not set, but {given}. Start with deepspeed or torchrun, which set "
            "both, or unset both to train with one rank"
        )
    if rank >= max(size, 1):
        raise InputError(
            f"RANK is {rank}, but WORLD_SIZE is {size}: ranks are counted from 0 to WORLD_SIZE - 1"
        )


def check_address() -> None:
    """Check where rank 0 serves the others: its port must be free and its name known.

    torch itself would retry until the timeout and then print pages of C++ stacks.

    Raises:
        InputError: MASTER_ADDR or MASTER_PORT is missing or cannot be used.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), whole_variable("MASTER_PORT", 0, most=65535)
    if not host or not port:
        raise InputError(
            "several ranks need MASTER_ADDR and MASTER_PORT, where rank 0 serves the others: start "
            "with deepspeed or torchrun, which set them"
        )
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise InputError(
            f"the host {host!r} of rank 0 is unknown ({error.strerror}): give its name or address "
            "with --master_addr of deepspeed, --master-addr of torchrun, or MASTER_ADDR"
        ) from None
    if int(os.environ["RANK"]):
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            raise InputError(
                f"port {port} cannot be used ({error.strerror}), perhaps because of another run: "
                "choose another one with --master_port of deepspeed, --master-port of torchrun, "
                "or MASTER_PORT"
            ) from None


def start(timeout_s: float, local_rank: int | None = None) -> Ranks:
    """Join the other ranks and return this process's Ranks.

    The backend is NCCL with a GPU and gloo without. A collective that takes longer than timeout_s
    ends the run with an error instead of blocking forever.

    Raises:
        InputError: The ranks cannot join: a port is in use, rank 0 is not reached, or the
            launcher's variables are wrong.
    """
    check_variables()
    import deepspeed
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # At stage 1, DeepSpeed prints memory use a dozen times at the start, each time after a garbage
    # collection, and has no option against it.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # DeepSpeed calls collectives by names that torch 2.13 deprecates. Users cannot act on the
    # warning.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed compiles its shared-memory op at the first start, and a kill during that leaves a
    # lock that blocks every later start. Plain gloo does the same work.
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
    others = int(os.environ["WORLD_SIZE"]) - 1
    # torchrun serves the store itself, which has the ranks' addresses.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        if others:
            check_address()
        else:
            # A rank by itself needs no port that another run could use.
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    local_rank, device = take_device(local_rank)
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        with reported_wait(f"{others} other rank(s) at {address}"):
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=timeout_s),
                verbose=False,
            )
            control_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    except RuntimeError as error:
        reason = " ".join(str(error).partition("Exception raised from")[0].split())[:200]
        raise InputError(
            f"rank {os.environ['RANK']} could not join the {others} other rank(s) at {address} "
            f"within train.timeout_s = {timeout_s:g} s ({reason}). Start every rank from 0 to "
            f"{others} once, and check --master_addr, --master_port and the network "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        ) from error
    return Ranks(
        rank=dist.get_rank(),
        local_rank=local_rank,
        size=dist.get_world_size(),
        device=device,
        local_size=int(
            os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        ),
        control_group=control_group,
    )


def stop() -> None:
    """Leave the process group.

    Without this, a rank that ends early can leave the others waiting.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
