"""AdamW and Muon over flat fp32 shards, and the learning rate schedule."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from iomm.engine.config import OptimSection
from iomm.layers import at_least_float32

# Updates a flat shard in place: (flat, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps,
# weight_decay).
AdamwBackend = Callable[..., None]

# Optimizer state of a flat shard, by the kind of its optimizer.
STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Values per block of the multi-tensor kernel, the number that apex passes.
CHUNK = 2048 * 32
# Maximum size of a stack of matrices that are orthogonalised together, in bytes of float32. A few
# large products fill a GPU. On a CPU a stack saves calls, 13 % at 96 x 96, until it outgrows the
# cache: 96 x 384 gains nothing in stacks of two and loses 7 % in stacks of eight (one thread,
# AVX512, 2 MiB of L2).
STACK_BYTES = {"cuda": 1 << 26, "cpu": 1 << 18}


def learning_rate(step: int, config: OptimSection, num_steps: int) -> float:
    """Return the learning rate of step 0, 1, ...

    Linear warmup over warmup_steps, then constant, or a half cosine that reaches 0 at num_steps.
    """
    rate = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine" and step > config.warmup_steps:
        rate *= 0.5 * (
            1
            + math.cos(
                math.pi * (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
            )
        )
    return rate


def make_optimizer(
    module: nn.Module, config: OptimSection, adamw: AdamwBackend | None = None
) -> "ShardedOptimizer":
    """Return an optimizer over a module's trained parameters.

    AdamW, or Muon for the matrices of layers (blocks, refiners, connector, query adapter) and AdamW
    for everything else. `adamw` does AdamW's update and defaults to torch's fused kernel.

    The alignment head stays with AdamW, as REPA trains it: like the input and output layers of the
    generator it is not part of the residual stream, and Newton-Schulz steps for a head that is
    discarded after training would be wasted.
    """
    layers = {
        id(part.weight)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
        and any(where in name for where in ("blocks.", "refiners.", "adapter."))
        and "modulation" not in name
    }
    matrices = [p for p in module.parameters() if id(p) in layers] if config.kind == "muon" else []
    others = [p for p in module.parameters() if config.kind != "muon" or id(p) not in layers]
    groups = [{"params": others, "kind": "adamw"}]
    if matrices:
        groups.append({"params": matrices, "kind": "muon"})
    return ShardedOptimizer(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        newton_schulz_steps=config.newton_schulz_steps,
        adamw=adamw or adamw_torch,
    )


def adamw_torch(
    flat: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Take one AdamW step of a flat shard with torch's fused kernel.

    Updates the shard, both moments and `step` in place.
    """
    adamw(
        [flat],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def adamw_multi_tensor(kernel: Callable[..., None]) -> AdamwBackend:
    """Return a replacement for adamw_torch that calls multi_tensor_adam of NVIDIA apex.

    The kernel's signature is kernel(chunk, overflow, [gradients, weights, first moments, second
    moments], lr, beta 1, beta 2, eps, step, decoupled decay, bias correction, decay).
    """

    def update(
        flat: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        step: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        step += 1
        overflow = torch.zeros(1, dtype=torch.int32, device=flat.device)
        kernel(
            CHUNK,
            overflow,
            [[grad], [flat.detach()], [exp_avg], [exp_avg_sq]],
            lr,
            *betas,
            eps,
            int(step),
            1,
            1,
            weight_decay,
        )

    return update


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Locate one matrix in the flat shards of all ranks.

    Rank r's flat shard holds cuts[r] = (offset, numel) of the flattened matrix, and the cuts in
    order of ranks make the whole. A single cut means that every rank holds the whole matrix.

    `parts` has the number of rows of each matrix that is fused into it (query, key and value are
    three).
    """

    shape: tuple[int, int]
    parts: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]

    def unfuse(self) -> list["Matrix"]:
        """Return one Matrix for each fused part.

        The rows of a part are consecutive in the flattened matrix.
        """
        found, start = [], 0
        for rows in self.parts:
            end = start + rows * self.shape[1]
            at, cuts = 0, []
            for offset, numel in self.cuts:
                first, last = max(start, at), min(end, at + numel)
                cuts.append((offset + first - at, last - first) if first < last else (0, 0))
                at += numel
            found.append(Matrix(shape=(rows, self.shape[1]), parts=(rows,), cuts=tuple(cuts)))
            start = end
        return found


class ShardedOptimizer(torch.optim.Optimizer):
    """Update flat shards with AdamW or Muon, by the `kind` of their parameter group.

    Muon (Jordan et al., 2024; with the rate matched to AdamW's update size by 0.2 sqrt(max(rows,
    columns)), as in Moonlight, arXiv 2502.16982) works on whole matrices. `bind` sets which
    matrices a shard holds cuts of. Matrices of equal shape form stacks, and one rank orthogonalises
    each stack. Cuts are sent to that rank and back by two all-to-alls per step; momentum stays in
    the shards. Where every rank holds everything, only results are sent, by one all-gather. Stacks
    do not depend on the number of ranks, and neither does any bit of the update.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        momentum: float,
        newton_schulz_steps: int = 5,
        adamw: AdamwBackend = adamw_torch,
    ) -> None:
        super().__init__(
            groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum)
        )
        # {flat shard: [stacks of rank 0, stacks of rank 1, ...]}, a stack being a list of matrices.
        self.stacks: dict[Tensor, list[list[list[Matrix]]]] = {}
        self.rank = 0
        self.size = 1
        self.replicated = False
        self.adamw = adamw
        self.newton_schulz_steps = newton_schulz_steps

    def bind(
        self, matrices: dict[Tensor, list[Matrix]], rank: int, size: int, replicated: bool = False
    ) -> None:
        """Set which matrices the Muon shards hold.

        Args:
            matrices: {flat shard: its matrices}, in the same order on every rank.
            rank: This rank.
            size: Number of ranks.
            replicated: Every rank holds whole matrices, in a single cut each.
        """
        self.rank = rank
        self.size = size
        self.replicated = replicated
        for flat, fused in matrices.items():
            stacks = stacks_of(
                [part for matrix in fused for part in matrix.unfuse()],
                STACK_BYTES[flat.device.type],
            )
            owners = spread(
                [
                    sum(math.prod(matrix.shape) * min(matrix.shape) for matrix in stack)
                    for stack in stacks
                ],
                size,
            )
            self.stacks[flat] = [
                [stack for stack, owner in zip(stacks, owners, strict=True) if owner == r]
                for r in range(size)
            ]

    def fresh_state(self, flat: Tensor, kind: str) -> dict[str, Tensor]:
        """Return the state of a flat shard, created if there is none yet."""
        state = self.state[flat]
        if not state:
            # torch's kernel reads the step on the GPU and the other backends need a number on the
            # host, which avoids a GPU sync in both cases.
            device = flat.device if self.adamw is adamw_torch else "cpu"
            state.update(
                {name: torch.zeros_like(flat) for name in STATE[kind]},
                step=torch.zeros((), device=device),
            )
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every shard that has a gradient."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is None:
                    continue
                state = self.fresh_state(flat, group["kind"])
                if group["kind"] == "adamw":
                    self.adamw_step(flat, state, group)
                else:
                    self.muon_step(flat, state, group)

    def adamw_step(self, flat: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Take one AdamW step of a flat shard."""
        self.adamw(
            flat,
            flat.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def muon_step(self, flat: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Take one Muon step of a flat shard."""
        state["step"] += 1
        buffer = state["momentum_buffer"].lerp_(flat.grad, 1 - group["momentum"])
        # Nesterov momentum.
        update = flat.grad.lerp(buffer, group["momentum"])
        by_owner = self.stacks[flat]
        matrices = [matrix for stacks in by_owner for stack in stacks for matrix in stack]
        if group["weight_decay"]:
            flat.mul_(1 - group["lr"] * group["weight_decay"])
        if self.replicated or self.size == 1:
            orthogonals = self.orthogonalise_replicated(update, by_owner)
        else:
            orthogonals = self.orthogonalise_sharded(update, by_owner)
        for matrix, orthogonal in zip(matrices, orthogonals, strict=True):
            self.cut(flat, matrix).add_(orthogonal, alpha=-group["lr"])

    def cut(self, flat: Tensor, matrix: Matrix) -> Tensor:
        """Return this rank's cut of a matrix as a view of the flat shard."""
        return flat.narrow(0, *matrix.cuts[0 if self.replicated else self.rank])

    def orthogonalise_replicated(
        self, update: Tensor, by_owner: list[list[list[Matrix]]]
    ) -> list[Tensor]:
        """Return all matrices of a replicated update, orthogonalised and flattened.

        They are in the order of by_owner. Each rank orthogonalises its stacks, and one all-gather
        exchanges the results, padded to equal lengths.
        """
        ours = (
            new
            for stack in by_owner[self.rank]
            for new in orthogonal_stack(
                [self.cut(update, matrix).view(matrix.shape) for matrix in stack],
                self.newton_schulz_steps,
            )
        )
        if self.size == 1:
            return list(ours)
        numels = [
            [math.prod(matrix.shape) for stack in stacks for matrix in stack] for stacks in by_owner
        ]
        longest = max(map(sum, numels))
        sent, held = update.new_zeros(longest), update.new_empty(self.size * longest)
        for place, new in zip(
            sent[: sum(numels[self.rank])].split(numels[self.rank]), ours, strict=True
        ):
            place.copy_(new)
        dist.all_gather_into_tensor(held, sent)
        return [
            new
            for part, of_rank in zip(held.split(longest), numels, strict=True)
            for new in part[: sum(of_rank)].split(of_rank)
        ]

    def orthogonalise_sharded(
        self, update: Tensor, by_owner: list[list[list[Matrix]]]
    ) -> list[Tensor]:
        """Return this rank's cuts of all orthogonalised matrices, in the order of by_owner.

        Takes two all-to-alls: each owner receives the cuts of its stacks from all ranks, and sends
        the orthogonalised cuts back.
        """
        ranks = range(self.size)
        cuts = [
            [self.cut(update, matrix) for stack in stacks for matrix in stack]
            for stacks in by_owner
        ]
        away = [sum(map(len, of_owner)) for of_owner in cuts]
        sizes = [
            [matrix.cuts[rank][1] for stack in by_owner[self.rank] for matrix in stack]
            for rank in ranks
        ]
        here = [sum(numels) for numels in sizes]
        sent = torch.cat([cut for of_owner in cuts for cut in of_owner])
        # Rank 0's cuts of this rank's matrices, then rank 1's, ...
        held = sent.new_empty(sum(here))
        dist.all_to_all_single(held, sent, here, away)
        by_rank = [part.split(numels) for part, numels in zip(held.split(here), sizes, strict=True)]
        by_matrix = zip(*by_rank, strict=True)
        for stack in by_owner[self.rank]:
            # The cuts of each matrix of the stack, in order of ranks.
            pieces = [next(by_matrix) for _ in stack]
            wholes = [
                torch.cat(of_ranks).view(matrix.shape)
                for of_ranks, matrix in zip(pieces, stack, strict=True)
            ]
            results = orthogonal_stack(wholes, self.newton_schulz_steps)
            for of_ranks, new in zip(pieces, results, strict=True):
                parts = new.split([len(piece) for piece in of_ranks])
                for piece, values in zip(of_ranks, parts, strict=True):
                    piece.copy_(values)
        dist.all_to_all_single(sent, held, away, here)
        return list(sent.split([len(cut) for of_owner in cuts for cut in of_owner]))


def stacks_of(matrices: list[Matrix], limit: int) -> list[list[Matrix]]:
    """Return the matrices grouped into stacks of one shape, which may include transposed ones.

    A stack has at most `limit` bytes of float32, or a single matrix. The result is the same on
    every rank and for any number of ranks.
    """
    by_shape = {}
    for matrix in matrices:
        by_shape.setdefault((min(matrix.shape), max(matrix.shape)), []).append(matrix)
    stacks = []
    for (rows, columns), group in by_shape.items():
        num = max(1, limit // (4 * rows * columns))
        stacks += [group[i : i + num] for i in range(0, len(group), num)]
    return stacks


def spread(costs: Sequence[float], size: int) -> list[int]:
    """Return the owner rank of each item.

    Items are assigned in order of decreasing cost, each to the rank with the least work up to then.
    The result is the same on every rank.
    """
    work, owners = [0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = work.index(min(work))
        work[owners[i]] += costs[i]
    return owners


def orthogonal_stack(matrices: list[Tensor], steps: int = 5) -> list[Tensor]:
    """Orthogonalise and scale matrices of one shape together, and return each flattened.

    Some of the matrices may be transposed.
    """
    scale = 0.2 * math.sqrt(max(matrices[0].shape))
    tall = [matrix.shape[0] > matrix.shape[1] for matrix in matrices]
    wide = [matrix.T if is_tall else matrix for matrix, is_tall in zip(matrices, tall, strict=True)]
    # A single matrix is not stacked: mm takes 10 % less time than bmm at 96 x 96 on a CPU.
    stack = orthogonal(torch.stack(wide) if len(wide) > 1 else wide[0], steps) * scale
    return [
        (x.T if is_tall else x).flatten()
        for x, is_tall in zip(stack.view(len(wide), *wide[0].shape), tall, strict=True)
    ]


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return approximately the nearest (semi-)orthogonal matrices.

    The input is (rows, columns), or a stack of them, with rows <= columns. The result has its
    dtype.

    Newton-Schulz steps X <- P X, P = a + b G + c G^2, G = X X^T (after five, singular values are
    within about 0.7 to 1.2), in bfloat16 on a GPU and in float32 on a CPU, where bfloat16 may be
    emulated.

    In float32, wide matrices take the same steps on G only. X is only ever multiplied by
    polynomials of the first G. These commute, therefore G <- P G P, and the product of all P is
    applied to X once. Five steps of rows x 4 rows take 50 rows^3 products instead of 90. In
    bfloat16, G would lose its small eigenvalues.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else at_least_float32(matrices)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if x.dtype == torch.bfloat16 or x.shape[-1] < 2 * x.shape[-2]:
        for _ in range(steps):
            gram = x @ x.mT
            x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.to(matrices.dtype)
    gram, applied = x @ x.mT, None
    for step in range(steps):
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        applied = polynomial if applied is None else polynomial @ applied
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    return (applied @ x).to(matrices.dtype)
