"""The optimizers over flat fp32 shards, and the learning rate."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}     # a flat shard's tensors, by kind
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def learning_rate(step, config, num_steps):
    """Rate of step 0, 1, ...: linear warm-up over warmup_steps, then constant, or a half cosine to 0 at num_steps."""
    rate = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine" and step > config.warmup_steps:
        rate *= 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)))
    return rate


def make_optimizer(module, config):
    """AdamW, or Muon for matrices inside blocks and AdamW for everything else, over a module's trained parameters."""
    blocks = {id(p) for name, p in module.named_parameters() if "blocks." in name and p.ndim == 2 and "modulation" not in name}
    matrices = [p for p in module.parameters() if id(p) in blocks] if config.kind == "muon" else []
    others = [p for p in module.parameters() if config.kind != "muon" or id(p) not in blocks]
    groups = [{"params": others, "kind": "adamw"}] + [{"params": matrices, "kind": "muon"}] * bool(matrices)
    return ShardedOptimizer(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
                            momentum=config.momentum)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Where one matrix lies in a flat shard: `numel` values from `offset` on, this rank's equal cut of the padded matrix.

    parts: rows of the matrices that are fused into it (query, key and value are three)."""

    shape: tuple
    parts: tuple
    offset: int
    numel: int


class ShardedOptimizer(torch.optim.Optimizer):
    """Steps whatever flat shards its groups hold: AdamW (torch's fused one) or Muon, by the group's `kind`.

    Muon (Jordan et al., 2024; the rate matched to AdamW's update size as in Moonlight, arXiv 2502.16982: 0.2 sqrt(max(rows,
    columns))) works on whole matrices. `bind` says which matrices a shard holds pieces of. Each matrix has one rank that
    orthogonalises it: pieces travel there and back by two all-to-alls, once a step; momentum stays in the shards."""

    def __init__(self, groups, *, lr, betas, eps, weight_decay, momentum):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum))
        self.pieces, self.rank, self.size = {}, 0, 1

    def bind(self, pieces, rank, size):
        """pieces: {flat shard: [Piece]} of the Muon shards."""
        self.pieces, self.rank, self.size = pieces, rank, size

    def fresh_state(self, flat, kind):
        """Makes the state of a flat shard if there is none yet, and returns it."""
        state = self.state[flat]
        if not state:
            state.update({name: torch.zeros_like(flat) for name in STATE[kind]}, step=torch.zeros((), device=flat.device))
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
        adamw([flat], [flat.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], fused=True, amsgrad=False,
              beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False)

    def muon_step(self, flat, state, group):
        state["step"] += 1
        buffer = state["momentum_buffer"].lerp_(flat.grad, 1 - group["momentum"])
        update = flat.grad.lerp(buffer, group["momentum"])           # Nesterov
        pieces = self.pieces[flat]
        owners = spread([math.prod(piece.shape) * min(piece.shape) for piece in pieces], self.size)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for piece, orthogonal in zip(pieces, self.orthogonalise(update, pieces, owners)):
            flat[piece.offset:piece.offset + piece.numel].add_(orthogonal, alpha=-group["lr"])

    def orthogonalise(self, update, pieces, owners):
        """This rank's pieces of the orthogonalised, scaled matrices, in the order of `pieces`."""
        cuts = [update[piece.offset:piece.offset + piece.numel] for piece in pieces]
        if self.size == 1:
            return [orthogonal_flat(cut, piece) for cut, piece in zip(cuts, pieces)]
        ours = [piece for piece, owner in zip(pieces, owners) if owner == self.rank]
        by_owner = [i for rank in range(self.size) for i, owner in enumerate(owners) if owner == rank]
        counts = [sum(piece.numel for piece, owner in zip(pieces, owners) if owner == rank) for rank in range(self.size)]
        sent = torch.cat([cuts[i] for i in by_owner])
        held = sent.new_empty(self.size * counts[self.rank])
        dist.all_to_all_single(held, sent, [counts[self.rank]] * self.size, counts)
        held = held.view(self.size, -1)                              # row r: rank r's cuts of our matrices
        start = 0
        for piece in ours:
            columns = held[:, start:start + piece.numel]
            columns.copy_(orthogonal_flat(columns.reshape(-1), piece).view(self.size, -1))
            start += piece.numel
        dist.all_to_all_single(sent, held.flatten(), counts, [counts[self.rank]] * self.size)
        back, start = [None] * len(pieces), 0
        for i in by_owner:
            back[i] = sent[start:start + pieces[i].numel]
            start += pieces[i].numel
        return back


def spread(costs, size):
    """Owner rank of each matrix: dearest first, each to the rank with the least work so far. The same on every rank."""
    work, owners = [0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = work.index(min(work))
        work[owners[i]] += costs[i]
    return owners


def orthogonal_flat(flat, piece):
    """A padded, flattened matrix -> the same layout: each fused part orthogonalised and scaled."""
    numel = math.prod(piece.shape)
    matrix = flat[:numel].view(piece.shape)
    parts = [orthogonal(part) * (0.2 * math.sqrt(max(part.shape))) for part in matrix.split(piece.parts)]
    return torch.nn.functional.pad(torch.cat(parts).flatten(), (0, len(flat) - numel))


def orthogonal(matrix, steps=5):
    """Nearest (semi-)orthogonal matrix, roughly: five Newton-Schulz steps X <- a X + (b G + c G^2) X, G = X X^T, in bfloat16
    (singular values land in about 0.7 to 1.2). Returns the input's dtype."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
