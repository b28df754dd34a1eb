"""The optimizers over flat fp32 shards, and the learning rate."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from iomm.layers import at_least_float32

# A flat shard's tensors, by kind.
STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Values a block of the multi-tensor kernel takes, as apex calls it.
CHUNK = 2048 * 32
# Most of a stack of matrices that are orthogonalised together, in bytes of float32. A GPU is filled by few large products. On a
# CPU a stack saves calls, 13 % at 96 x 96, until it outgrows the cache: 96 x 384 gains nothing in twos and loses 7 % in eights
# (one thread, AVX512, 2 MiB of L2).
STACK_BYTES = {"cuda": 1 << 26, "cpu": 1 << 18}


def learning_rate(step, config, num_steps):
    """Rate of step 0, 1, ...: linear warm-up over warmup_steps, then constant, or a half cosine to 0 at num_steps."""
    rate = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine" and step > config.warmup_steps:
        rate *= 0.5 * (
            1
            + math.cos(
                math.pi * (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
            )
        )
    return rate


def make_optimizer(module, config, adamw=None):
    """AdamW, or Muon for the matrices of layers (blocks, refiners, connector, query adapter) and AdamW for everything else,
    over a module's trained parameters. adamw: what does AdamW's update, torch's fused kernel if not given.

    The alignment head stays with AdamW, as REPA trains it: like the generator's ends it is no layer of the residual
    stream, and Newton-Schulz steps for a read-out that is thrown away would be wasted.
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
    groups = [{"params": others, "kind": "adamw"}] + [{"params": matrices, "kind": "muon"}] * bool(
        matrices
    )
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


def adamw_torch(flat, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps, weight_decay):
    """One AdamW step of a flat shard in place, `step` (a tensor) included, by torch's fused kernel."""
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


def adamw_multi_tensor(kernel):
    """The same by multi_tensor_adam of NVIDIA apex: kernel(chunk, overflow, [gradients, weights, first, second moments],
    lr, beta 1, beta 2, eps, step, decoupled decay, bias correction, decay).
    """

    def update(flat, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps, weight_decay):
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
    """Where one matrix lies: rank r's flat shard holds cuts[r] = (offset, numel) of it. Cuts in order of ranks make the whole; a
    single cut is the whole, on every rank.

    parts: rows of the matrices that are fused into it (query, key and value are three).
    """

    shape: tuple
    parts: tuple
    cuts: tuple

    def apart(self) -> list["Matrix"]:
        """Return the fused matrices as matrices of their own: rows are consecutive in a flattened matrix."""
        found, start = [], 0
        for rows in self.parts:
            end, at, cuts = start + rows * self.shape[1], 0, []
            for offset, numel in self.cuts:
                first, last = max(start, at), min(end, at + numel)
                cuts.append((offset + first - at, last - first) if first < last else (0, 0))
                at += numel
            found.append(Matrix(shape=(rows, self.shape[1]), parts=(rows,), cuts=tuple(cuts)))
            start = end
        return found


class ShardedOptimizer(torch.optim.Optimizer):
    """Steps whatever flat shards its groups hold: AdamW or Muon, by the group's `kind`.

    Muon (Jordan et al., 2024; the rate matched to AdamW's update size as in Moonlight, arXiv 2502.16982: 0.2 sqrt(max(rows,
    columns))) works on whole matrices. `bind` says which matrices a shard holds cuts of. Matrices of equal shape form stacks,
    and each stack has one rank that orthogonalises it: cuts travel there and back by two all-to-alls, once a step; momentum
    stays in the shards. Where every rank holds everything, only results travel, by one all-gather. Stacks do not depend on
    the number of ranks, so that neither does any bit of the update.
    """

    def __init__(
        self,
        groups,
        *,
        lr,
        betas,
        eps,
        weight_decay,
        momentum,
        newton_schulz_steps=5,
        adamw=adamw_torch,
    ):
        super().__init__(
            groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum)
        )
        self.stacks, self.rank, self.size, self.replicated, self.adamw = {}, 0, 1, False, adamw
        self.newton_schulz_steps = newton_schulz_steps

    def bind(self, matrices, rank, size, replicated=False):
        """matrices: {flat shard: [Matrix]} of the Muon shards, in the same order on every rank. replicated: every rank holds
        whole matrices, in a single cut each.
        """
        self.rank, self.size, self.replicated = rank, size, replicated
        for flat, fused in matrices.items():
            stacks = stacks_of(
                [part for matrix in fused for part in matrix.apart()], STACK_BYTES[flat.device.type]
            )
            owners = spread(
                [
                    sum(math.prod(matrix.shape) * min(matrix.shape) for matrix in stack)
                    for stack in stacks
                ],
                size,
            )
            self.stacks[flat] = [
                [stack for stack, owner in zip(stacks, owners) if owner == r] for r in range(size)
            ]

    def fresh_state(self, flat, kind):
        """Makes the state of a flat shard if there is none yet, and returns it."""
        state = self.state[flat]
        if not state:
            # torch's kernel reads the step on the GPU, the others want it as a number: no wait for the GPU in either case.
            device = flat.device if self.adamw is adamw_torch else "cpu"
            state.update(
                {name: torch.zeros_like(flat) for name in STATE[kind]},
                step=torch.zeros((), device=device),
            )
        return state

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every shard that has a gradient."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    state = self.fresh_state(flat, group["kind"])
                    (self.adamw_step if group["kind"] == "adamw" else self.muon_step)(
                        flat, state, group
                    )

    def adamw_step(self, flat, state, group):
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

    def muon_step(self, flat, state, group):
        state["step"] += 1
        buffer = state["momentum_buffer"].lerp_(flat.grad, 1 - group["momentum"])
        # Nesterov
        update = flat.grad.lerp(buffer, group["momentum"])
        by_owner = self.stacks[flat]
        matrices = [matrix for stacks in by_owner for stack in stacks for matrix in stack]
        if group["weight_decay"]:
            flat.mul_(1 - group["lr"] * group["weight_decay"])
        exchange = self.gathered if self.replicated or self.size == 1 else self.exchanged
        for matrix, orthogonal in zip(matrices, exchange(update, by_owner), strict=True):
            self.cut(flat, matrix).add_(orthogonal, alpha=-group["lr"])

    def cut(self, flat: Tensor, matrix: Matrix) -> Tensor:
        """Return this rank's cut of a matrix, a view into the flat shard."""
        return flat.narrow(0, *matrix.cuts[0 if self.replicated else self.rank])

    def gathered(self, update: Tensor, by_owner: list) -> list[Tensor]:
        """Return all matrices orthogonalised, flattened, in the order of by_owner, from a flat update that is whole on every
        rank. Each rank orthogonalises its stacks; one all-gather carries the results, padded to equal lengths.
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
            for part, of_rank in zip(held.split(longest), numels)
            for new in part[: sum(of_rank)].split(of_rank)
        ]

    def exchanged(self, update: Tensor, by_owner: list) -> list[Tensor]:
        """Return this rank's cuts of all matrices orthogonalised, in the order of by_owner. Two all-to-alls: each owner gets
        the cuts of its stacks from all ranks, and sends back what became of them.
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
        # rank 0's cuts of our matrices, then rank 1's, ...
        held = sent.new_empty(sum(here))
        dist.all_to_all_single(held, sent, here, away)
        by_matrix = zip(*(part.split(numels) for part, numels in zip(held.split(here), sizes)))
        for stack in by_owner[self.rank]:
            # Of each matrix, in order of ranks.
            pieces = [next(by_matrix) for _ in stack]
            wholes = [
                torch.cat(of_ranks).view(matrix.shape) for of_ranks, matrix in zip(pieces, stack)
            ]
            for of_ranks, new in zip(pieces, orthogonal_stack(wholes, self.newton_schulz_steps)):
                for piece, values in zip(of_ranks, new.split([len(piece) for piece in of_ranks])):
                    piece.copy_(values)
        dist.all_to_all_single(sent, held, away, here)
        return list(sent.split([len(cut) for of_owner in cuts for cut in of_owner]))


def stacks_of(matrices: list[Matrix], limit: int) -> list[list[Matrix]]:
    """Return the matrices in stacks of one shape, transposed ones among them, of at most `limit` bytes of float32 or one
    matrix. The same on every rank, for any number of ranks.
    """
    by_shape = {}
    for matrix in matrices:
        by_shape.setdefault((min(matrix.shape), max(matrix.shape)), []).append(matrix)
    stacks = []
    for (rows, columns), alike in by_shape.items():
        num = max(1, limit // (4 * rows * columns))
        stacks += [alike[i : i + num] for i in range(0, len(alike), num)]
    return stacks


def spread(costs, size):
    """Owner rank of each item: dearest first, each to the rank with the least work so far. The same on every rank."""
    work, owners = [0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = work.index(min(work))
        work[owners[i]] += costs[i]
    return owners


def orthogonal_stack(matrices: list[Tensor], steps: int = 5) -> list[Tensor]:
    """Return matrices of one shape, transposed or not, orthogonalised together and scaled, each flattened."""
    scale = 0.2 * math.sqrt(max(matrices[0].shape))
    tall = [matrix.shape[0] > matrix.shape[1] for matrix in matrices]
    wide = [matrix.T if is_tall else matrix for matrix, is_tall in zip(matrices, tall)]
    # One matrix is no stack: mm takes 10 % less than bmm at 96 x 96 on a CPU.
    stack = orthogonal(torch.stack(wide) if len(wide) > 1 else wide[0], steps) * scale
    return [
        (x.T if is_tall else x).flatten()
        for x, is_tall in zip(stack.view(len(wide), *wide[0].shape), tall)
    ]


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest (semi-)orthogonal matrices, roughly: (rows, columns), or a stack of them, rows <= columns.

    Newton-Schulz steps X <- P X, P = a + b G + c G^2, G = X X^T (singular values land in about 0.7 to 1.2 after five), in
    bfloat16 on a GPU and in float32 on a CPU, where bfloat16 may be emulated. The result has the input's dtype.

    In float32, wide matrices take the same steps on G alone: all that X goes through are polynomials of the first G, which
    commute, so that G <- P G P and the product of all P is applied to X once. Five steps of rows x 4 rows take 50 rows^3
    products instead of 90. In bfloat16 G would lose its small eigenvalues.
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
