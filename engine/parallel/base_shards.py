"""Keep the frozen base of LoRA in parts, one on each rank of a node, and gather a block to use it.

A block's weights are gathered before its forward and before its backward pass, the next block's
meanwhile, and freed afterwards. The values are the same to the bit, and so is what is computed.

FSDP2 and ZeRO-3 shard parameters, which the base has none of (iomm/lora.py). Both also move and
swap the tensors of a module, so only one of them can own it, and DeepSpeed owns A and B.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iomm.generator import blocks_of, empty_generator
from iomm.lora import frozen_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from iomm.config import GeneratorConfig
    from iomm.engine.parallel.ranks import Ranks
    from iomm.lora import Generator
    from iomm.model import IOMM

# Every weight begins at a multiple of this many bytes, as in memory that CUDA allocates: kernels
# choose their path by the alignment.
ALIGNMENT = 512
# Ranks of a node where nothing else is known, as in a dry run.
NODE = 8


def rounded_up(num_bytes: int) -> int:
    """Return a number of bytes rounded up to a multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def part_bytes(weights: Iterable[Tensor], num_parts: int, width: int) -> int:
    """Return the bytes of each of the equal parts of a block's weights, with padding.

    Args:
        weights: the block's weights.
        num_parts: number of ranks of the node.
        width: bytes of a number.
    """
    total = sum(rounded_up(weight.numel() * width) for weight in weights)
    return rounded_up(-(-total // num_parts))


def base_parts(model: IOMM, num_ranks: int, width: int) -> list[int]:
    """Return the bytes of each block's base that a rank of a node keeps, with padding.

    Args:
        model: a model with LoRA.
        num_ranks: number of ranks of the node.
        width: bytes of a number.
    """
    weights = (frozen_weights(block).values() for block in blocks_of(model.generator))
    return [part_bytes(of_block, num_ranks, width) for of_block in weights]


def base_bytes(model: IOMM, width: int) -> int:
    """Return the bytes of all blocks' base, as `base_parts` but whole."""
    blocks = blocks_of(model.generator)
    return width * sum(w.numel() for block in blocks for w in frozen_weights(block).values())


def needed(index: int, step: int, num_blocks: int) -> set[int]:
    """Return the blocks that are gathered while one is used: itself and the one `step` further."""
    return {index, index + step} & set(range(num_blocks))


def gathers(num_blocks: int, first: int = 0) -> list[tuple[int, int]]:
    """Return (visit, block) of every gather of a micro-batch that follows another one.

    Visits number the blocks of the forward pass and then those of the backward pass.

    Args:
        num_blocks: number of blocks.
        first: first block that has a backward pass; the blocks after it have one, too.
    """
    visits = [(block, 1) for block in range(num_blocks)]
    visits += [(block, -1) for block in reversed(range(first, num_blocks))]
    live, found = set(), []
    for _ in range(2):
        found = []
        for visit, (block, step) in enumerate(visits):
            wanted = needed(block, step, num_blocks)
            found += [(visit, other) for other in sorted(wanted - live)]
            live = wanted
    return found


def base_gathers(model: IOMM) -> list[tuple[int, int]]:
    """Return gathers() of a micro-batch of a model with LoRA."""
    blocks = blocks_of(model.generator)
    # A layer has one product if neither it nor anything before it is trained.
    backward = [any(getattr(m, "products", 1) > 1 for m in block.modules()) for block in blocks]
    return gathers(len(blocks), backward.index(True))


class ShardedBlock:
    """The weights of a block: `part` on this rank, and `whole` while the block is gathered.

    All weights are views of `whole`, one behind the other. Its storage is empty in between and gets
    memory for each gather. Tensors that autograd has saved are of the same storage, so the backward
    pass of a block that is not recomputed finds the values that were gathered for it.
    """

    def __init__(self, block: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        """Replace the block's weights, which are on the meta device, by such views.

        The values are still to be written.
        """
        self.group = group
        self.rank = dist.get_rank(group)
        width = next(block.parameters()).element_size()
        num_bytes = part_bytes(block.parameters(), dist.get_world_size(group), width)
        self.part = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.whole = self.part.new_empty(num_bytes * dist.get_world_size(group))
        self.storage = self.whole.untyped_storage()
        self.pending: dist.Work | None = None
        offset = 0
        for module in block.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                # Not `whole[...].view()`: autograd would see one tensor with many views.
                view = torch.empty(0, dtype=weight.dtype, device=device).set_(
                    self.storage, offset // width, weight.shape, weight.stride()
                )
                setattr(module, name, nn.Parameter(view, requires_grad=False))
                offset += rounded_up(weight.numel() * width)
        self.free()

    def write(self, weight: Tensor, source: Tensor) -> None:
        """Copy to a weight what this rank keeps of it. The rest of `source` is not read."""
        begin, width = weight.storage_offset() * weight.element_size(), weight.element_size()
        end, own = begin + weight.numel() * width, self.rank * len(self.part)
        first, last = max(begin, own), min(end, own + len(self.part))
        if first < last:
            values = source.flatten()[(first - begin) // width : (last - begin) // width]
            self.part[first - own : last - own].view(weight.dtype).copy_(values)

    def start(self) -> None:
        """Start to gather the block unless that has happened.

        NCCL gathers on a stream that waits for what was launched before, and runs beside the rest.
        """
        if not self.storage.nbytes():
            self.storage.resize_(len(self.whole))
            self.pending = dist.all_gather_into_tensor(
                self.whole, self.part, group=self.group, async_op=True
            )

    def wait(self) -> None:
        """Let what follows on this stream wait until the block is gathered."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None

    def free(self) -> None:
        """Give the memory of the gathered block back. A later read of a weight would crash."""
        self.wait()
        self.storage.resize_(0)


class BaseShards:
    """The sharded blocks of a generator, on the ranks of a node.

    These ranks must run the same passes. The group has all ranks of this node and no others, so
    nodes may differ in their number of ranks, and no gather leaves a node.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        """Join the ranks of the node, on all ranks of the run together.

        Args:
            ranks: all ranks.
            timeout_s: time limit of a gather in seconds.
        """
        self.device = ranks.device
        self.blocks: list[ShardedBlock] = []
        # Indexes of the blocks that are gathered or being gathered.
        self.live: set[int] = set()
        hosts = ranks.by_host()
        # Number of ranks of each node.
        self.sizes = [len(members) for members in hosts]
        for members in hosts:
            group = dist.new_group(members, timeout=timedelta(seconds=timeout_s))
            if ranks.rank in members:
                self.group, self.size = group, len(members)

    def empty_generator(self, config: GeneratorConfig, dtype: torch.dtype) -> Generator:
        """Return a generator without weights, whose blocks are sharded.

        The order of the blocks in it is that of the forward pass.
        """
        generator = empty_generator(config, device="meta", dtype=dtype)
        for index, block in enumerate(blocks_of(generator)):
            self.blocks.append(ShardedBlock(block, self.group, self.device))
            block.register_forward_pre_hook(lambda *_, index=index: self.use(index, 1))
            block.register_forward_hook(
                lambda _, inputs, outputs, index=index: self.expect_backward(index, outputs)
            )
        # to_empty() would also replace the blocks' weights.
        return generator._apply(
            lambda weight: (
                torch.empty_like(weight, device=self.device) if weight.is_meta else weight
            )
        )

    def use(self, index: int, step: int) -> None:
        """Gather a block, start to gather the one `step` further, and free all others.

        Autograd runs what was computed last first. So when a gradient of a block's outputs is
        there, the backward pass of the next block is through, and its weights can be freed.
        """
        wanted = needed(index, step, len(self.blocks))
        for other in self.live - wanted:
            self.blocks[other].free()
        self.live = wanted
        for other in sorted(wanted, key=lambda other: other != index):
            self.blocks[other].start()
        self.blocks[index].wait()

    def expect_backward(self, index: int, outputs: Tensor | tuple[Tensor | None, ...]) -> None:
        """Gather a block again as soon as the gradient of one of its outputs is there."""
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if output is not None and output.requires_grad:
                output.register_hook(lambda _: self.use(index, -1))

    def owner(self, weight: Tensor) -> int | None:
        """Return the index of the block that has a weight, or None if it is not sharded."""
        storage = weight.untyped_storage()._cdata
        found = (i for i, block in enumerate(self.blocks) if block.storage._cdata == storage)
        return next(found, None)

    def gather(self, weight: Tensor) -> None:
        """Make a weight readable until another one is. Called by all ranks of the node."""
        if (index := self.owner(weight)) is not None:
            self.use(index, 0)

    def copy(self, weight: Tensor, source: Tensor) -> None:
        """Copy `source` to a weight, or what this rank keeps of it if it is sharded."""
        if (index := self.owner(weight)) is None:
            weight.copy_(source)
        else:
            self.blocks[index].write(weight, source)
