"""What benchmarks/ops.py measures: per op its bodies, inputs to check, inputs to time, and the least bytes or FLOPs."""

from dataclasses import dataclass, field

import torch

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


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: an op at one size. Bodies and reference take what `check` and `time` return."""

    op: str
    name: str
    # name -> function
    bodies: dict
    reference: callable
    # () -> small float64 inputs on the CPU, odd sizes
    check: callable
    # () -> inputs of the real size, on the device, in its dtype
    time: callable
    # Least bytes of memory traffic, forward and backward.
    bytes: int = 0
    flops: int = 0
    # The body of ours that is under test, empty: none.
    ours: str = ""
    # Other body -> wanted: its time over ours.
    targets: dict = field(default_factory=dict)
    # wanted: share of the copy bandwidth
    share: float = 0.0
    # Every bit equal to the reference.
    exact: bool = False
    differentiable: bool = True
    # To check in, if not that of the run.
    dtype: torch.dtype | None = None


def normal(*shape, grad=False, seed=[0]):
    seed[0] += 1
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed[0]), dtype=torch.float64)
    return x.requires_grad_(grad)


def drawn(device, dtype, *shape, grad=False):
    """Random values made on the device: large inputs."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ragged(batch, mean, seed=0):
    """`batch` lengths around `mean`, half to one and a half of it."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(max(1, mean // 2), mean * 3 // 2 + 1, (batch,), generator=random).tolist()


def attention_case(
    name,
    device,
    dtype,
    *,
    lengths,
    prefixes,
    heads,
    dim,
    causal=True,
    suffix=True,
    prefix_grad=False,
    **rest,
):
    """masked_attention, forward and backward. Counts 2 products forward and 5 backward over the visible pairs."""
    query_heads, key_heads = heads

    def make(lengths, prefixes, draw):
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

    def run(body):
        return lambda *x: body(*x, causal, dim**-0.5)

    bodies = {"sdpa": run(masked_attention_sdpa)}
    if device == "cuda":
        if not varlen.varlen_why_not():
            bodies["varlen"] = run(varlen.masked_attention_varlen)
        if not varlen.flash_why_not():
            bodies["flash"] = run(varlen.masked_attention_flash)
        if not triton_support.why_not():
            bodies["triton"] = run(masked_attention_triton)
    pairs = sum(p * n for p, n in zip(prefixes or [0] * len(lengths), lengths))
    pairs += sum(n * (n + 1) // 2 if causal else n * n for n in lengths) if suffix else 0
    return Case(
        op="masked_attention",
        name=name,
        bodies=bodies,
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


def row_case(op, torch_body, triton_body, reference, device, make, dtype, **rest):
    """An op over rows: PyTorch's formula, the same compiled, and Triton's."""
    bodies = {"torch": torch_body}
    if device == "cuda":
        bodies["compile"] = torch.compile(torch_body, fullgraph=True, dynamic=False)
        if not triton_support.why_not():
            bodies["triton"] = triton_body
    small, large = make
    return Case(
        op=op,
        bodies=bodies,
        reference=reference,
        check=lambda: small(normal),
        ours="triton",
        time=lambda: large(lambda *shape, grad=False: drawn(device, dtype, *shape, grad=grad)),
        targets={"compile": 1.0},
        share=0.8,
        **rest,
    )


def rows_of(device, dtype):
    """Cases of norm_modulate and qk_norm_rope."""
    batch, length, width, heads = (32, 1024, 1536, 12) if device == "cuda" else (4, 64, 192, 6)
    size = batch * length * width * torch.finfo(dtype).bits // 8

    def modulated(batch, length, width):
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

    def heads_of(batch, length, num_condition, heads, dim):
        def make(draw):
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


def token_cases(device, dtype):
    """Cases of the ops with C++ and CUDA bodies."""
    ours = "cuda" if device == "cuda" else "cpp"
    there = native.why_not(device) is None
    goal = {
        "ours": ours,
        "targets": {"reference": 1.0},
        "share": 0.8 if device == "cuda" else 0.0,
        "differentiable": False,
    }

    def bodies(compiled, reference):
        return ({ours: compiled} if there else {}) | {"reference": reference}

    many, value = (512 if device == "cuda" else 32), torch.finfo(dtype).bits // 8
    latents = many * 16 * 64 * 64 * value

    def noisy(batch, channels, height, width, draw):
        return [
            draw(batch, channels, height, width),
            torch.rand(batch),
            2**63 - 9,
            torch.arange(batch) + 2**35,
            2,
        ]

    def placed(x):
        return [y.to(device) if isinstance(y, torch.Tensor) else y for y in x]

    draw = lambda *shape: drawn(device, dtype, *shape)  # noqa: E731
    yield Case(
        op="noisy_tokens",
        name=f"{many} x 16 x 64 x 64",
        bytes=3 * latents,
        bodies=bodies(noisy_tokens_compiled, noisy_tokens_reference),
        reference=noisy_tokens_reference,
        check=lambda: noisy(3, 16, 6, 68, normal),
        time=lambda: placed(noisy(many, 16, 64, 64, draw)),
        **goal,
    )

    def pixels(batch, height, width):
        random = torch.Generator().manual_seed(0)
        bytes_of = torch.randint(
            0, 256, (batch, height, width, 3), generator=random, dtype=torch.uint8
        )
        return [bytes_of, 14, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], dtype]

    images = 32 if device == "cuda" else 8
    yield Case(
        op="image_patches",
        name=f"{images} x 448 x 448 x 3",
        bytes=images * 448 * 448 * 3 * (1 + value),
        exact=True,
        bodies=bodies(image_patches_compiled, image_patches_reference),
        reference=image_patches_reference,
        check=lambda: pixels(2, 28, 266),
        time=lambda: placed(pixels(images, 448, 448)),
        **goal,
    )
    for fixed in (False, True):

        def packed(batch, capacity, fixed=fixed):
            return [7, torch.arange(batch) + 2**35, 256, 0.85, fixed, capacity]

        yield Case(
            op="visible_tokens",
            name=f"32 x 256, {'fixed' if fixed else 'bernoulli'}, packed",
            exact=True,
            bodies=bodies(visible_tokens_compiled, visible_tokens_reference),
            reference=visible_tokens_reference,
            check=lambda packed=packed: packed(37, 1300),
            time=lambda packed=packed: placed(packed(32, 1423)),
            **(goal | {"share": 0.0}),
        )


def adamw_reference(flat, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps, weight_decay):
    """AdamW (Loshchilov and Hutter, 2019, algorithm 2 with the rate as torch has it), in place."""
    step += 1
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.lerp_(grad.square(), 1 - betas[1])
    first, second = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    flat.sub_(lr * (first / (second.sqrt() + eps) + weight_decay * flat))


def adamw_case(device):
    """AdamW over one flat fp32 shard, IOMM-B's (1,620 M parameters) on one of 8 GPUs. torch, the default of optim.adamw, is to
    be the fastest of those installed; else choose the other.
    """
    bodies, numel = {"torch": adamw_torch}, 202_545_080 if device == "cuda" else 1_000_000
    if device == "cuda" and torch.cuda.is_available():
        try:
            bodies["apex"] = adamw_backend("apex", torch.device(device))
        except InputError as error:
            print(error)

    def run(name, body):
        def step(flat, grad, exp_avg, exp_avg_sq):
            number = torch.full((), 9.0, device=flat.device if name == "torch" else "cpu")
            body(
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
        bodies={name: run(name, body) for name, body in bodies.items()},
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


def cases(device, dtype):
    """All rows of the table on a device type."""
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
    yield from rows_of(device, dtype)
    yield from token_cases(device, dtype)
    yield adamw_case(device)
