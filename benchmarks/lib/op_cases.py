"""The cases of benchmarks/ops.py.

Each case holds an op's backends, inputs to check, inputs to time, and the least bytes or FLOPs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iomm.config import InputError
from iomm.engine.parallel.optim import adamw_torch
from iomm.engine.parallel.zero import adamw_backend
from iomm.kernels import native
from iomm.kernels.image_patches import image_patches_compiled, image_patches_reference
from iomm.kernels.masked_attention import varlen
from iomm.kernels.masked_attention.reference import masked_attention_reference
from iomm.kernels.masked_attention.sdpa import masked_attention_sdpa
from iomm.kernels.masked_attention.triton_op import masked_attention_triton
from iomm.kernels.noisy_tokens import noisy_tokens_compiled, noisy_tokens_reference
from iomm.kernels.norm_modulate import (
    norm_modulate_reference,
    norm_modulate_torch,
    norm_modulate_triton,
)
from iomm.kernels.qk_norm_rope import (
    qk_norm_rope_reference,
    qk_norm_rope_torch,
    qk_norm_rope_triton,
)
from iomm.kernels.triton_ops import support as triton_support
from iomm.kernels.visible_tokens import visible_tokens_compiled, visible_tokens_reference
from iomm.layers import at_least_float32, attend
from iomm.vae import wide_attention


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at one size. Backends and reference take the inputs that `check` and `time` return."""

    op: str
    name: str
    # Name -> function.
    backends: dict[str, Callable]
    reference: Callable
    # Returns small float64 inputs of odd sizes on the CPU.
    check: Callable[[], list]
    # Returns inputs of the real size, on the device and in its dtype.
    time: Callable[[], list]
    # Least bytes of memory traffic, forward and backward.
    bytes: int = 0
    flops: int = 0
    # Our backend under test; empty for none.
    ours: str = ""
    # Other backend -> target for its time over ours.
    targets: dict[str, float] = field(default_factory=dict)
    # Target for the share of the copy bandwidth.
    share: float = 0.0
    # The result must equal the reference's bit by bit.
    exact: bool = False
    differentiable: bool = True
    # The dtype to check in, if not the run's.
    dtype: torch.dtype | None = None


SEEDS = count(1)


def normal(*shape: int, grad: bool = False) -> Tensor:
    """Return float64 values on the CPU, from a new seed at every call."""
    x = torch.randn(
        shape, generator=torch.Generator().manual_seed(next(SEEDS)), dtype=torch.float64
    )
    return x.requires_grad_(grad)


def drawn(device: str, dtype: torch.dtype, *shape: int, grad: bool = False) -> Tensor:
    """Return random values that are drawn on the device, for large inputs."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)


def offsets(lengths: list[int]) -> Tensor:
    """Return the offsets of packed sequences of these lengths, int32."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ragged(batch: int, mean: int, seed: int = 0) -> list[int]:
    """Return `batch` random lengths from half to one and a half of `mean`."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(max(1, mean // 2), mean * 3 // 2 + 1, (batch,), generator=random).tolist()


def attention_case(
    name: str,
    device: str,
    dtype: torch.dtype,
    *,
    lengths: list[int],
    prefixes: list[int] | None,
    heads: tuple[int, int],
    dim: int,
    causal: bool = True,
    suffix: bool = True,
    prefix_grad: bool = False,
    **rest: Any,
) -> Case:
    """Return a case of masked_attention, forward and backward.

    FLOPs count 2 products forward and 5 backward over the visible pairs.

    Args:
        name: name of the case.
        device: device type to time on.
        dtype: dtype of the timed inputs.
        lengths: number of queries of each sequence.
        prefixes: length of each sequence's prefix; None for no prefix.
        heads: number of query heads and of key heads.
        dim: width of a head.
        causal: queries attend causally to the suffix.
        suffix: the queries have keys and values of their own.
        prefix_grad: keys and values of the prefix need gradients.
        rest: further fields of the case.
    """
    query_heads, key_heads = heads

    def make(lengths: list[int], prefixes: list[int] | None, draw: Callable) -> list:
        total, before = sum(lengths), sum(prefixes or [0])
        return [
            draw(total, query_heads, dim, grad=True),
            *(draw(total, key_heads, dim, grad=True) if suffix else None for _ in range(2)),
            offsets(lengths),
            *(
                draw(before, key_heads, dim, grad=prefix_grad) if prefixes else None
                for _ in range(2)
            ),
            offsets(prefixes) if prefixes else None,
        ]

    def run(backend: Callable) -> Callable:
        return lambda *x: backend(*x, causal, dim**-0.5)

    backends = {"sdpa": run(masked_attention_sdpa)}
    if device == "cuda":
        if not varlen.varlen_why_not():
            backends["varlen"] = run(varlen.masked_attention_varlen)
        if not varlen.flash_why_not():
            backends["flash"] = run(varlen.masked_attention_flash)
        if not triton_support.why_not():
            backends["triton"] = run(masked_attention_triton)
    pairs = sum(p * n for p, n in zip(prefixes or [0] * len(lengths), lengths, strict=True))
    if suffix:
        pairs += sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    return Case(
        op="masked_attention",
        name=name,
        backends=backends,
        reference=run(masked_attention_reference),
        check=lambda: make([65, 1, 0, 130], [3, 64, 5, 0] if prefixes else None, normal),
        time=lambda: [
            x if x is None else x.to(device) if x.dtype == torch.int32 else x
            for x in make(
                lengths, prefixes, lambda *shape, grad: drawn(device, dtype, *shape, grad=grad)
            )
        ],
        flops=7 * 2 * pairs * query_heads * dim,
        ours="triton",
        **rest,
    )


def row_case(
    op: str,
    torch_backend: Callable,
    triton_backend: Callable,
    reference: Callable,
    device: str,
    make: tuple[Callable, Callable],
    dtype: torch.dtype,
    **rest: Any,
) -> Case:
    """Return a case of an op over rows: PyTorch's formula, the same compiled, and Triton's kernel.

    make: functions that return the small inputs to check and the large ones to time, from a
    function that draws a tensor.
    """
    backends = {"torch": torch_backend}
    if device == "cuda":
        backends["compile"] = torch.compile(torch_backend, fullgraph=True, dynamic=False)
        if not triton_support.why_not():
            backends["triton"] = triton_backend
    small, large = make
    return Case(
        op=op,
        backends=backends,
        reference=reference,
        check=lambda: small(normal),
        ours="triton",
        time=lambda: large(lambda *shape, grad=False: drawn(device, dtype, *shape, grad=grad)),
        targets={"compile": 1.0},
        share=0.8,
        **rest,
    )


def row_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of norm_modulate and qk_norm_rope."""
    batch, length, width, heads = (32, 1024, 1536, 12) if device == "cuda" else (4, 64, 192, 6)
    size = batch * length * width * torch.finfo(dtype).bits // 8

    def modulated(batch: int, length: int, width: int) -> Callable:
        return lambda draw: [
            draw(batch, length, width, grad=True),
            draw(batch, width, grad=True),
            draw(batch, width, grad=True),
        ]

    yield row_case(
        "norm_modulate",
        lambda *x: norm_modulate_torch(*x, True, 1e-6),
        lambda *x: norm_modulate_triton(*x, True, 1e-6),
        lambda *x: norm_modulate_reference(*x, True, 1e-6),
        device,
        (modulated(3, 65, 96), modulated(batch, length, width)),
        dtype,
        name=f"{batch} x {length} x {width}",
        bytes=5 * size,
    )

    def heads_of(batch: int, length: int, num_condition: int, heads: int, dim: int) -> Callable:
        def make(draw: Callable) -> list:
            angles = draw(length, dim // 2).float()
            weights = [draw(dim, grad=True) for _ in range(4)]
            return [
                draw(batch, length, 3, heads, dim, grad=True),
                *weights[:2],
                angles.cos(),
                angles.sin(),
                draw(batch, num_condition, 3, heads, dim, grad=True),
                *weights[2:],
            ]

        return make

    joint = size * (length + length // 4) // length
    yield row_case(
        "qk_norm_rope",
        lambda *x: qk_norm_rope_torch(*x, 1e-6),
        lambda *x: qk_norm_rope_triton(*x, 1e-6),
        lambda *x: qk_norm_rope_reference(*x, 1e-6),
        device,
        (heads_of(2, 33, 5, 3, 32), heads_of(batch, length, length // 4, heads, width // heads)),
        dtype,
        name=f"{batch} x ({length // 4} + {length}) x {heads} x {width // heads}",
        bytes=14 * joint,
    )


def token_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of the ops with C++ and CUDA backends."""
    ours = "cuda" if device == "cuda" else "cpp"
    is_built = native.why_not(device) is None
    goal = {
        "ours": ours,
        "targets": {"reference": 1.0},
        "share": 0.8 if device == "cuda" else 0.0,
        "differentiable": False,
    }

    def backends(compiled: Callable, reference: Callable) -> dict[str, Callable]:
        return ({ours: compiled} if is_built else {}) | {"reference": reference}

    many, value = (512 if device == "cuda" else 32), torch.finfo(dtype).bits // 8
    latents = many * 16 * 64 * 64 * value

    def noisy(batch: int, channels: int, height: int, width: int, draw: Callable) -> list:
        return [
            draw(batch, channels, height, width),
            torch.rand(batch),
            2**63 - 9,
            torch.arange(batch) + 2**35,
            2,
        ]

    def placed(x: list) -> list:
        return [y.to(device) if isinstance(y, Tensor) else y for y in x]

    def draw(*shape: int) -> Tensor:
        return drawn(device, dtype, *shape)

    yield Case(
        op="noisy_tokens",
        name=f"{many} x 16 x 64 x 64",
        bytes=3 * latents,
        backends=backends(noisy_tokens_compiled, noisy_tokens_reference),
        reference=noisy_tokens_reference,
        check=lambda: noisy(3, 16, 6, 68, normal),
        time=lambda: placed(noisy(many, 16, 64, 64, draw)),
        **goal,
    )

    def pixels(batch: int, height: int, width: int) -> list:
        random = torch.Generator().manual_seed(0)
        shape = (batch, height, width, 3)
        pixels_BHWC = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        return [pixels_BHWC, 14, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], dtype]

    images = 32 if device == "cuda" else 8
    yield Case(
        op="image_patches",
        name=f"{images} x 448 x 448 x 3",
        bytes=images * 448 * 448 * 3 * (1 + value),
        exact=True,
        backends=backends(image_patches_compiled, image_patches_reference),
        reference=image_patches_reference,
        check=lambda: pixels(2, 28, 266),
        time=lambda: placed(pixels(images, 448, 448)),
        **goal,
    )
    for fixed in (False, True):

        def packed(batch: int, capacity: int, fixed: bool = fixed) -> list:
            return [7, torch.arange(batch) + 2**35, 256, 0.85, fixed, capacity]

        yield Case(
            op="visible_tokens",
            name=f"32 x 256, {'fixed' if fixed else 'bernoulli'}, packed",
            exact=True,
            backends=backends(visible_tokens_compiled, visible_tokens_reference),
            reference=visible_tokens_reference,
            check=lambda packed=packed: packed(37, 1300),
            time=lambda packed=packed: placed(packed(32, 1423)),
            **(goal | {"share": 0.0}),
        )


def softmax_attention(q_BLAE: Tensor, k_BLAE: Tensor, v_BLAE: Tensor) -> Tensor:
    """Return softmax attention (B, L, A, E) by its formula, in at least float32, rounded once."""
    q, k, v = (at_least_float32(x) for x in (q_BLAE, k_BLAE, v_BLAE))
    weights = (torch.einsum("biae,bjae->baij", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("baij,bjae->biae", weights, v).to(q_BLAE.dtype)


def joint_case(device: str, dtype: torch.dtype, *, sequence_first: bool) -> Case:
    """Return a case of the generator's attention, with its tensors in one of two memory layouts.

    The generator's blocks use sequence-first, where a stream's tokens are one matrix. That saves
    0.3 GB of copies per block and 16 images, less than 0.1 ms on an H200. If sequence-first takes
    longer than batch-first by more than that, qk_norm_rope should write batch-first.
    """

    def make(batch: int, length: int, heads: int, dim: int, draw: Callable) -> list:
        shape = (length, batch, heads, dim) if sequence_first else (batch, length, heads, dim)
        tensors = [draw(*shape) for _ in range(3)]
        if sequence_first:
            tensors = [x.transpose(0, 1) for x in tensors]
        return [x.requires_grad_() for x in tensors]

    def ordered(out: Tensor) -> Tensor:
        """Return the output in the order of its memory, so that its gradient has the same."""
        return out.transpose(0, 1) if sequence_first else out

    batch, length, heads, dim = 16, 1280, 12, 128
    return Case(
        op="attend",
        name=f"joint {length}, {'sequence' if sequence_first else 'batch'}-first",
        backends={"sdpa": lambda *x: ordered(attend(*x))},
        reference=lambda *x: ordered(softmax_attention(*x).flatten(2)),
        check=lambda: make(3, 65, 2, 32, normal),
        time=lambda: make(batch, length, heads, dim, lambda *shape: drawn(device, dtype, *shape)),
        flops=7 * 2 * batch * heads * length**2 * dim,
    )


def wide_case(device: str, dtype: torch.dtype) -> Case:
    """Return the case of the VAE's attention, whose only head is 512 wide."""
    batch, length = (16, 4096) if device == "cuda" else (2, 256)
    products = wide_attention
    if device == "cuda":
        products = torch.compile(wide_attention, fullgraph=True, dynamic=False)

    def sdpa(*tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x[:, None] for x in tensors))[:, 0]

    def reference(*tensors: Tensor) -> Tensor:
        return softmax_attention(*(x[:, :, None] for x in tensors))[:, :, 0]

    return Case(
        op="wide_attention",
        name=f"{batch} x {length} x 512",
        backends={"sdpa": sdpa, "products": products},
        reference=reference,
        check=lambda: [normal(2, 65, 512) for _ in range(3)],
        time=lambda: [drawn(device, dtype, batch, length, 512) for _ in range(3)],
        flops=2 * 2 * batch * length**2 * 512,
        ours="products",
        targets={"sdpa": 2.5},
        differentiable=False,
    )


def adamw_reference(
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
    """Apply a step of AdamW in place.

    Loshchilov and Hutter, 2019, algorithm 2, with the learning rate as in torch. The arguments are
    those of the backends of optim.adamw.
    """
    step += 1
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.lerp_(grad.square(), 1 - betas[1])
    first, second = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    flat.sub_(lr * (first / (second.sqrt() + eps) + weight_decay * flat))


def adamw_case(device: str) -> Case:
    """Return the case of AdamW over one flat fp32 shard.

    The shard is that of IOMM-B (1,620 M parameters) on one of 8 GPUs. torch, the default of
    optim.adamw, should be the fastest of the installed ones; otherwise choose the other.
    """
    backends, numel = {"torch": adamw_torch}, 202_545_080 if device == "cuda" else 1_000_000
    if device == "cuda" and torch.cuda.is_available():
        try:
            backends["apex"] = adamw_backend("apex", torch.device(device))
        except InputError as error:
            print(error)

    def run(name: str, backend: Callable) -> Callable:
        def step(
            flat: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            number = torch.full((), 9.0, device=flat.device if name == "torch" else "cpu")
            backend(
                flat,
                grad,
                exp_avg,
                exp_avg_sq,
                number,
                lr=1e-4,
                betas=(0.9, 0.95),
                eps=1e-8,
                weight_decay=0.1,
            )
            return flat, exp_avg, exp_avg_sq

        return step

    return Case(
        op="adamw",
        name=f"{numel / 1e6:.0f} M fp32",
        backends={name: run(name, backend) for name, backend in backends.items()},
        reference=run("reference", adamw_reference),
        dtype=torch.float32,
        differentiable=False,
        bytes=7 * 4 * numel,
        check=lambda: [normal(1003), normal(1003), normal(1003), normal(1003) ** 2],
        time=lambda: [
            *(drawn(device, torch.float32, numel) for _ in range(3)),
            torch.rand(numel, device=device),
        ],
        ours="torch",
        targets={"apex": 1.0},
        share=0.8 if device == "cuda" else 0.0,
    )


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield all cases for a device type."""
    if device == "cuda":
        queries = {"lengths": [256] * 32, "heads": (12, 2), "dim": 128}
        yield attention_case(
            "MLLM queries, prefix ~50",
            device,
            dtype,
            prefixes=ragged(32, 50),
            **queries,
            targets={"sdpa": 3.0, "varlen": 0.95},
        )
        yield attention_case(
            "MLLM queries, prefix ~300",
            device,
            dtype,
            prefixes=ragged(32, 300),
            **queries,
            targets={"varlen": 1.2},
        )
        yield attention_case(
            "MLLM prefix pass, ~50",
            device,
            dtype,
            lengths=ragged(32, 50),
            prefixes=None,
            heads=(12, 2),
            dim=128,
            targets={"varlen": 0.95},
        )
        yield attention_case(
            "adapter, 256 x ~50",
            device,
            dtype,
            lengths=[256] * 32,
            prefixes=ragged(32, 50),
            heads=(12, 12),
            dim=128,
            suffix=False,
            prefix_grad=True,
            targets={"varlen": 0.95},
        )
        yield attention_case(
            "joint, 1280 x 1280",
            device,
            dtype,
            lengths=[1280] * 32,
            prefixes=None,
            heads=(12, 12),
            dim=128,
            causal=False,
        )
        for sequence_first in (False, True):
            yield joint_case(device, dtype, sequence_first=sequence_first)
    else:
        yield attention_case(
            "queries, prefix ~50",
            device,
            dtype,
            lengths=[64] * 4,
            prefixes=ragged(4, 50),
            heads=(6, 2),
            dim=32,
        )
    yield wide_case(device, dtype)
    yield from row_cases(device, dtype)
    yield from token_cases(device, dtype)
    yield adamw_case(device)
