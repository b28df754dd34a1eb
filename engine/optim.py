"""The optimizers over flat fp32 shards, and the learning rate."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw

STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}     # a flat shard's tensors, by kind
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
CHUNK = 2048 * 32                # values a block of the multi-tensor kernel takes, as both of its owners call it


def learning_rate(step, config, num_steps):
    """Rate of step 0, 1, ...: linear warm-up over warmup_steps, then constant, or a half cosine to 0 at num_steps."""
    rate = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine" and step > config.warmup_steps:
        rate *= 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)))
    return rate


def make_optimizer(module, config, adamw=None):
    """AdamW, or Muon for the matrices of layers (blocks, refiners, connector, query adapter) and AdamW for everything else,
    over a module's trained parameters. adamw: what does AdamW's update, torch's fused kernel if not given.

    The alignment head stays with AdamW, as REPA trains it: like the generator's ends it is no layer of the residual
    stream, and Newton-Schulz steps for a read-out that is thrown away would be wasted."""
    layers = {id(part.weight) for name, part in module.named_modules() if isinstance(part, nn.Linear)
              and any(where in name for where in ("blocks.", "refiners.", "adapter.")) and "modulation" not in name}
    matrices = [p for p in module.parameters() if id(p) in layers] if config.kind == "muon" else []
    others = [p for p in module.parameters() if config.kind != "muon" or id(p) not in layers]
    groups = [{"params": others, "kind": "adamw"}] + [{"params": matrices, "kind": "muon"}] * bool(matrices)
    return ShardedOptimizer(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
                            momentum=config.momentum, adamw=adamw or adamw_torch)


def adamw_torch(flat, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps, weight_decay):
    """One AdamW step of a flat shard in place, `step` (a tensor) included, by torch's fused kernel."""
    adamw([flat], [grad], [exp_avg], [exp_avg_sq], [], [step], fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr,
          weight_decay=weight_decay, eps=eps, maximize=False)


def adamw_multi_tensor(kernel):
    """The same by multi_tensor_adam of NVIDIA apex, or by DeepSpeed's copy of it: kernel(chunk, overflow, [gradients,
    weights, first, second moments], lr, beta 1, beta 2, eps, step, decoupled decay, bias correction, decay)."""
    def update(flat, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps, weight_decay):
        step += 1
        overflow = torch.zeros(1, dtype=torch.int32, device=flat.device)
        kernel(CHUNK, overflow, [[grad], [flat.detach()], [exp_avg], [exp_avg_sq]], lr, *betas, eps, int(step), 1, 1, weight_decay)
    return update


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Where one matrix lies: rank r's flat shard holds cuts[r] = (offset, numel) of it. Cuts in order of ranks make the whole.

    parts: rows of the matrices that are fused into it (query, key and value are three)."""

    shape: tuple
    parts: tuple
    cuts: tuple


class ShardedOptimizer(torch.optim.Optimizer):
    """Steps whatever flat shards its groups hold: AdamW or Muon, by the group's `kind`.

    Muon (Jordan et al., 2024; the rate matched to AdamW's update size as in Moonlight, arXiv 2502.16982: 0.2 sqrt(max(rows,
    columns))) works on whole matrices. `bind` says which matrices a shard holds cuts of. Each matrix has one rank that
    orthogonalises it: cuts travel there and back by two all-to-alls, once a step; momentum stays in the shards."""

    def __init__(self, groups, *, lr, betas, eps, weight_decay, momentum, adamw=adamw_torch):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum))
        self.matrices, self.rank, self.size, self.adamw = {}, 0, 1, adamw

    def bind(self, matrices, rank, size):
        """matrices: {flat shard: [Matrix]} of the Muon shards, in the same order on every rank."""
        self.matrices, self.rank, self.size = matrices, rank, size

    def fresh_state(self, flat, kind):
        """Makes the state of a flat shard if there is none yet, and returns it."""
        state = self.state[flat]
        if not state:
            # torch's kernel reads the step on the GPU, the others want it as a number: no wait for the GPU in either case.
            device = flat.device if self.adamw is adamw_torch else "cpu"
            state.update({name: torch.zeros_like(flat) for name in STATE[kind]}, step=torch.zeros((), device=device))
        return state

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every shard that has a gradient."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    state = self.fresh_state(flat, group["kind"])
                    (self.adamw_step if group["kind"] == "adamw" else self.muon_step)(flat, state, group)

    def adamw_step(self, flat, state, group):
        self.adamw(flat, flat.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], lr=group["lr"], betas=group["betas"],
                   eps=group["eps"], weight_decay=group["weight_decay"])

    def muon_step(self, flat, state, group):
        state["step"] += 1
        buffer = state["momentum_buffer"].lerp_(flat.grad, 1 - group["momentum"])
        update = flat.grad.lerp(buffer, group["momentum"])           # Nesterov
        matrices = self.matrices[flat]
        owners = spread([math.prod(matrix.shape) * min(matrix.shape) for matrix in matrices], self.size)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for matrix, orthogonal in zip(matrices, self.orthogonalise(update, matrices, owners)):
            flat.narrow(0, *matrix.cuts[self.rank]).add_(orthogonal, alpha=-group["lr"])

    def orthogonalise(self, update, matrices, owners):
        """This rank's cuts of the orthogonalised, scaled matrices, in the order of `matrices`."""
        cuts = [update.narrow(0, *matrix.cuts[self.rank]) for matrix in matrices]
        if self.size == 1:
            return [orthogonal_flat(cut, matrix) for cut, matrix in zip(cuts, matrices)]
        ranks = range(self.size)
        by_owner = [i for rank in ranks for i, owner in enumerate(owners) if owner == rank]
        ours = [matrix for matrix, owner in zip(matrices, owners) if owner == self.rank]
        away = [sum(len(cut) for cut, owner in zip(cuts, owners) if owner == rank) for rank in ranks]
        sizes = [[matrix.cuts[rank][1] for matrix in ours] for rank in ranks]
        here = [sum(numels) for numels in sizes]
        sent = torch.cat([cuts[i] for i in by_owner])
        held = sent.new_empty(sum(here))                             # rank 0's cuts of our matrices, then rank 1's, ...
        dist.all_to_all_single(held, sent, here, away)
        by_rank = [part.split(numels) for part, numels in zip(held.split(here), sizes)]
        for i, matrix in enumerate(ours):
            whole = orthogonal_flat(torch.cat([parts[i] for parts in by_rank]), matrix)
            for parts, new in zip(by_rank, whole.split([numels[i] for numels in sizes])):
                parts[i].copy_(new)
        dist.all_to_all_single(sent, held, away, here)
        back = dict(zip(by_owner, sent.split([len(cuts[i]) for i in by_owner])))
        return [back[i] for i in range(len(matrices))]


def spread(costs, size):
    """Owner rank of each matrix: dearest first, each to the rank with the least work so far. The same on every rank."""
    work, owners = [0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = work.index(min(work))
        work[owners[i]] += costs[i]
    return owners


def orthogonal_flat(flat, matrix):
    """A flattened matrix -> the same layout: each fused part orthogonalised and scaled."""
    parts = [orthogonal(part) * (0.2 * math.sqrt(max(part.shape))) for part in flat.view(matrix.shape).split(matrix.parts)]
    return torch.cat(parts).flatten()


def orthogonal(matrix, steps=5):
    """Nearest (semi-)orthogonal matrix, roughly: five Newton-Schulz steps X <- a X + (b G + c G^2) X, G = X X^T, in bfloat16
    on a GPU and in float32 on a CPU, where it may be emulated (singular values land in about 0.7 to 1.2). Returns the input's dtype."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
