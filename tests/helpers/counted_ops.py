"""Count the launches and bytes of a function without running it, on the meta device."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Allocate without a launch.
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")


class Count(NamedTuple):
    """Ops that launch a kernel, at least one each, and the bytes that they read and write."""

    launches: int
    bytes: int
    names: list[str]


class Attended(torch.autograd.Function):
    """One fused attention: a launch each way, whose outputs have the layout of its inputs."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return torch.ops.aten.mul.Tensor(inputs[0], 1.0)

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.ops.aten.mul.Tensor(x, 1.0) for x in ctx.saved_tensors)


class FusedAttention(TorchFunctionMode):
    """Replace PyTorch's attention, which is unfused on the meta device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return Attended.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class Counter(TorchDispatchMode):
    """Records every op that returns new memory or writes into its arguments."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns
        )
        if not is_view and name not in ALLOCATIONS:
            self.names.append(name)
            tensors = tree_leaves((args, kwargs, out))
            self.bytes += sum(moved(x) for x in tensors if isinstance(x, torch.Tensor))
        return out


def moved(x):
    """Return the bytes of a tensor, where expanded dimensions count once."""
    sizes = [1 if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.element_size() * torch.Size(sizes).numel()


def counted(run, arguments):
    """Return the Count of run(*arguments), and of its backward pass if one needs gradients."""
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    with Counter() as counter, FusedAttention():
        out = run(*arguments)
        if leaves:
            torch.autograd.grad(out, leaves, torch.empty_like(out), allow_unused=True)
    return Count(len(counter.names), counter.bytes, counter.names)
