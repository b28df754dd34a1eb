"""Count on the meta device what autograd keeps for the backward pass, and what runs meanwhile.

Nothing is computed. Without torch.compile every saved tensor is counted as autograd saves it. With
it, blocks are split into a forward and a backward graph by AOTAutograd and Inductor's own min-cut
partitioner, whose saved tensors are counted; no code is generated. Attention is counted as the
fused kernels of a GPU keep it, because on the meta device PyTorch takes the unfused one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


@torch.library.custom_op("iomm_counts::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output of a fused attention and one float per row. It has no kernel."""
    raise NotImplementedError


@torch.library.custom_op("iomm_counts::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. It has no kernel."""
    raise NotImplementedError


attention.register_fake(
    lambda q, k, v, bias: (torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32))
)
attention_backward.register_fake(
    lambda grad, q, k, v, bias, out, rows: tuple(map(torch.empty_like, (q, k, v)))
)
attention.register_autograd(
    lambda ctx, grad, _: (*attention_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


class KeptInput(torch.autograd.Function):
    """Keeps what DeepSpeed's linear of `memory_efficient_linear` keeps: the input as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(*x.shape[:-1], len(weight_OI))


class KeptNorm(torch.autograd.Function):
    """Keeps what the fused RMS norm of a GPU keeps: the input and one float per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


class FusedKernels(TorchFunctionMode):
    """Replaces PyTorch's attention and RMS norm by ones that keep what a GPU's fused kernels keep.

    Of attention these are queries, keys, values, output and one float per row, and a mask as a bias
    in the dtype of the queries.
    """

    # torch.compile takes RMS norms apart.
    norms = True

    def __torch_function__(
        self,
        function: Callable,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v, *_ = args
            mask = kwargs.get("attn_mask")
            return attention(q, k, v, None if mask is None else mask.to(q.dtype))[0]
        if function is F.rms_norm and self.norms:
            return KeptNorm.apply(args[0], kwargs["weight"])
        return function(*args, **kwargs)


@contextmanager
def as_on_gpu(deepspeed_linear: bool = False) -> Iterator[None]:
    """Run code on the meta device as a GPU would keep it, with PyTorch's backends of all ops.

    deepspeed_linear: trained linear layers are DeepSpeed's.
    """
    original = torch._C._nn.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        trained = deepspeed_linear and weight.requires_grad
        return KeptInput.apply(x, weight) if trained else original(x, weight, bias)

    # Backends that IOMM_KERNELS selects may not run on the meta device. DeepSpeed may have replaced
    # the linear function already.
    with patch.dict(os.environ), patch.object(F, "linear", linear), FusedKernels():
        os.environ.pop("IOMM_KERNELS", None)
        yield


def storage_key(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage, valid while a tensor holds it."""
    return tensor.untyped_storage()._cdata


class Kept:
    """The storages that autograd keeps of what runs inside the context, without `own`."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.own = list(own)
        self._known = {storage_key(tensor) for tensor in self.own}
        self._kept: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    def add(self, tensor: Tensor) -> Tensor:
        """Count the storage of a tensor once, and return the tensor."""
        key = storage_key(tensor)
        if key not in self._known:
            self._kept[key] = tensor
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        """Return whether the storage of a tensor was counted."""
        return storage_key(tensor) in self._kept

    def num_bytes(self, without: Iterable[Tensor] = ()) -> int:
        """Return the bytes of all counted storages except those of some tensors."""
        rest = self._kept.keys() - {storage_key(tensor) for tensor in without}
        return sum(self._kept[key].untyped_storage().nbytes() for key in rest)

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)


def kept_bytes(run: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward pass of run(), without `own`."""
    with as_on_gpu(), Kept(own) as kept:
        run()
    return kept.num_bytes()


T = TypeVar("T")
# {what identifies a count: its result}. Tracing takes a second or two.
_counted: dict[Any, Any] = {}


def counted_once(key: Any, count: Callable[[], T]) -> T:
    """Return count(), remembered for as long as the process runs."""
    if key not in _counted:
        _counted[key] = count()
    return _counted[key]


class Part(nn.Module):
    """A function of a module and further arguments, as a module."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def partitioned(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that autograd sees as torch.compile would present it.

    module: holds all parameters and buffers that `function` reads.
    """
    # These take seconds to import, and only plans of compiled runs need them.
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    part = Part(module, function)
    state = {**dict(part.named_parameters()), **dict(part.named_buffers())}

    def call(*args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def of_tensors(state: dict[str, Tensor], *tensors: Tensor) -> Any:
            values = list(leaves)
            for i, tensor in zip(at, tensors, strict=True):
                values[i] = tensor
            return torch.func.functional_call(part, state, tree_unflatten(values, spec))

        traced = aot_function(
            of_tensors,
            fw_compiler=lambda graph, _: graph,
            bw_compiler=lambda graph, _: graph,
            partition_fn=lambda graph, inputs, **options: min_cut_rematerialization_partition(
                graph, inputs, compiler="inductor", **options
            ),
            decompositions=select_decomp_table(),
        )
        with patch.object(FusedKernels, "norms", False):
            return traced(state, *(leaves[i] for i in at))

    return call


@dataclass(frozen=True)
class Call:
    """What a block keeps of one call."""

    # Without its arguments.
    num_bytes: int
    # Indices of the arguments that it keeps.
    arguments: tuple[int, ...]
    outputs: Any


def signature(tree: Any) -> tuple:
    """Return shapes, strides, dtypes and requirements of gradients of the tensors in a tree."""
    return tuple(
        (tuple(x.shape), x.stride(), x.dtype, x.requires_grad) if isinstance(x, Tensor) else x
        for x in tree_leaves(tree)
    )


def call_of(
    block: nn.Module, args: tuple, *, compiled: bool, deepspeed_linear: bool = False
) -> Call:
    """Return what one call of a block keeps, counted once for all equal blocks."""
    parts = [(type(part), getattr(part, "fp8", None)) for part in block.modules()]
    key = (
        str(parts),
        getattr(block, "last", None),
        signature(list(block.parameters())),
        signature(args),
        compiled,
        deepspeed_linear,
    )

    def count() -> Call:
        forward = type(block).forward.__get__(block)
        run = partitioned(block, forward) if compiled else forward
        own = [*block.parameters(), *block.buffers()]
        with as_on_gpu(deepspeed_linear), Kept(own) as kept:
            outputs = run(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        return Call(
            kept.num_bytes(without=tensors),
            tuple(i for i, x in enumerate(args) if isinstance(x, Tensor) and kept.holds(x)),
            outputs,
        )

    return counted_once(key, count)


def kept_by_blocks(
    model: nn.Module,
    classes: tuple[type[nn.Module], ...],
    run: Callable[[nn.Module], Any],
    *,
    recompute: int,
    compiled: bool,
    deepspeed_linear: bool = False,
) -> int:
    """Return the bytes that autograd keeps of run(model) at its peak.

    Equal blocks are counted once. A recomputed block keeps its arguments until its backward pass,
    during which all of its activations exist, while those of the blocks that are not recomputed
    are gone already.

    Args:
        model: a model on the meta device. Its blocks are changed and cannot run afterwards.
        classes: classes of its blocks.
        run: calls the model.
        recompute: number of blocks, from the first, that recompute activations.
        compiled: every block is compiled.
        deepspeed_linear: as in as_on_gpu.
    """
    kept = Kept([*model.parameters(), *model.buffers()])
    by_block = {False: [0], True: [0]}

    def replace(block: nn.Module, recomputed: bool) -> None:
        def forward(*args: Any) -> Any:
            call = call_of(block, args, compiled=compiled, deepspeed_linear=deepspeed_linear)
            by_block[recomputed].append(call.num_bytes)
            for i, x in enumerate(args):
                if isinstance(x, Tensor) and (recomputed or i in call.arguments):
                    kept.add(x)
            leaves, spec = tree_flatten(call.outputs)
            return tree_unflatten(
                [
                    torch.empty_like(x).requires_grad_(x.requires_grad)
                    if isinstance(x, Tensor)
                    else x
                    for x in leaves
                ],
                spec,
            )

        block.forward = forward

    blocks = [module for module in model.modules() if isinstance(module, classes)]
    for i, block in enumerate(blocks):
        replace(block, i < recompute)
    with as_on_gpu(deepspeed_linear), kept:
        run(model)
    return kept.num_bytes() + max(sum(by_block[False]), max(by_block[True]))


class Peak(TorchDispatchMode):
    """Counts the bytes of new tensors that exist at the same time inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self._live = {k: entry for k, entry in self._live.items() if not entry[0].expired()}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := storage_key(x)) not in given:
                storage = x.untyped_storage()
                self._live[key] = StorageWeakRef(storage), storage.nbytes()
        self.num_bytes = max(self.num_bytes, sum(size for _, size in self._live.values()))
        return out


@torch.no_grad()
def peak_bytes(
    module: nn.Module, function: Callable[..., Any], *args: Tensor, dtype: torch.dtype
) -> int:
    """Return the most bytes that a gradient-free function of a module has at once.

    The module is on any device and its weights count as `dtype`; `args` are on the meta device and
    not counted. Run without torch.compile, which fuses some of the steps.
    """
    part = Part(module, function)
    state = {
        name: torch.empty_like(x, device="meta", dtype=dtype if x.is_floating_point() else x.dtype)
        for name, x in (*part.named_parameters(), *part.named_buffers())
    }

    def count() -> int:
        with as_on_gpu(), Peak() as peak:
            torch.func.functional_call(part, state, args)
        return peak.num_bytes

    return counted_once((type(module), signature(state), signature(args)), count)
