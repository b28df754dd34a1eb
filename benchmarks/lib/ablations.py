"""The step of benchmarks/lib/harness.py with one thing changed.

Each idea is switched off in turn, and features that are off by default are switched on.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate, islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.harness import Bench
from iomm.engine.parallel.prefetch import Prefetcher
from iomm.kernels import dispatch, fp8_linear
from iomm.kernels.masked_attention import masked_attention
from iomm.layers import TokenLinear, use_fp8
from iomm.mllm import MLLM, Condition


@contextmanager
def swapped(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes of an object within a context."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@contextmanager
def kernel_choice(choice: str) -> Iterator[None]:
    """Set IOMM_KERNELS within a context."""
    before = os.environ.pop("IOMM_KERNELS", None)
    os.environ["IOMM_KERNELS"] = choice
    try:
        yield
    finally:
        del os.environ["IOMM_KERNELS"]
        if before is not None:
            os.environ["IOMM_KERNELS"] = before


@contextmanager
def in_fp8(generator: nn.Module) -> Iterator[None]:
    """Run the generator's products in fp8 within a context.

    torch.compile makes graphs for that as well, in the first step.
    """
    use_fp8(generator)
    try:
        yield
    finally:
        for part in generator.modules():
            if isinstance(part, TokenLinear):
                # Deleted, not set to False: the graphs' guards check that the attribute exists.
                vars(part).pop("fp8", None)


def whole_pass(
    mllm: MLLM, queries_BQD: Tensor, condition: Condition, cache: None, *, causal: bool = True
) -> Tensor:
    """Compute MLLM.queries without the prefix split.

    Prompt, image tokens and queries take one pass with ordinary autograd.
    """
    decoder, (batch, num, width) = mllm.backbone.language_model, queries_BQD.shape
    device, bounds = queries_BQD.device, accumulate(condition.lengths, initial=0)
    steps = torch.arange(num, device=device)
    tokens, positions, is_query = [], [], []
    for b, (start, stop) in enumerate(pairwise(bounds)):
        tokens += [condition.tokens_TD[start:stop], queries_BQD[b]]
        positions += [condition.positions_T[start:stop], condition.end_B[b] + steps]
        is_query += [torch.zeros(stop - start, dtype=torch.bool), torch.ones(num, dtype=torch.bool)]
    x_SD, rotary = torch.cat(tokens), decoder.rotary_emb(queries_BQD, torch.cat(positions)[None])
    offsets = condition.offsets + num * torch.arange(batch + 1, dtype=torch.int32, device=device)
    lengths = tuple(length + num for length in condition.lengths)
    for layer in decoder.layers:
        q, k, v = mllm.project_qkv(layer, x_SD, rotary)
        mixed = masked_attention(q, k, v, offsets, causal=causal, lengths=lengths)
        x_SD = mllm.finish_layer(layer, x_SD, mixed)
    return decoder.norm(x_SD)[torch.cat(is_query).to(device)].view(batch, num, width)


def ablations(bench: Bench) -> dict[str, Callable[[], float]]:
    """Return {row: step with one thing changed}.

    Rows for which torch.compile makes new graphs come last. Other backends of the row kernels have
    no rows, because compiled blocks have already chosen theirs (benchmarks/ops.py --gpu times
    them).
    """
    model, mllm, recipe = bench.model, bench.model.frozen[0], bench.model.recipe
    rows = {
        "hidden tokens enter as zeros (mask.mode=zero)": lambda: [
            swapped(model, recipe=replace(recipe, mask=replace(recipe.mask, mode="zero")))
        ],
        "no prefix split": lambda: [
            swapped(
                mllm,
                prefix=lambda condition, **options: (None, None),
                queries=lambda *args, **kind: whole_pass(mllm, *args, **kind),
            )
        ],
        # Twice the generator's rows for the same images.
        "two times and noises for each image (train.noise_draws=2)": lambda: [
            swapped(model, recipe=replace(recipe, noise_draws=2))
        ],
    }
    late = {}
    own = [
        f"{op}:reference"
        for op, _, backend, _ in dispatch.table(bench.device)
        if backend in ("cpp", "cuda")
    ]
    if own:
        rows["no compiled ops of ours"] = lambda: [kernel_choice(",".join(own))]
    else:
        print("no row for our compiled ops: none is in use here (iomm doctor lists the reasons)")
    if bench.compiled:
        rows["no torch.compile"] = lambda: [torch.compiler.set_stance("force_eager")]
    if bench.device.type == "cuda":
        runnable = [
            backend.name
            for backend in dispatch._backends["masked_attention"]
            if backend.name != "reference"
            and backend.refusal("cuda", torch.bfloat16, mllm.head_dim) is None
        ]
        # The first is the default.
        for backend in runnable[1:]:
            late[f"masked_attention by {backend}"] = lambda backend=backend: [
                kernel_choice(f"masked_attention:{backend}")
            ]
        if fp8_linear.why_not() is None and bench.config.precision != "fp8":
            late["fp8 in the generator's blocks (precision=fp8)"] = lambda: [
                in_fp8(model.generator)
            ]
    # The very last, as its varying lengths create dynamic-shape graphs, which are used for fixed
    # lengths from then on.
    late["all outputs condition (adapter.conditions=all)"] = lambda: [
        swapped(model, recipe=replace(recipe, adapter=replace(recipe.adapter, conditions="all")))
    ]

    def inside(contexts: Callable[[], list[AbstractContextManager]]) -> Callable[[], float]:
        def run() -> float:
            with ExitStack() as stack:
                for context in contexts():
                    stack.enter_context(context)
                return bench.step()

        return run

    steps = {name: inside(contexts) for name, contexts in rows.items()}
    batches = bench.next()
    ready = [
        replace(
            batch,
            latents_BCHW=model.encode(batch.pixels_BCHW, batch.n_B.to(bench.device)).float(),
            pixels_BCHW=None,
        )
        for batch in batches
    ]
    steps["latents at hand (data.latents, without its reads)"] = lambda: bench.step(ready)
    if bench.device.type == "cuda":
        prefetch = Prefetcher(bench.batches, model.prepare, bench.device)
        steps["encoded ahead on a separate stream (train.overlap)"] = lambda: bench.step(
            islice(prefetch, bench.source.accumulation_steps), prefetch.fetch
        )
    return steps | {name: inside(contexts) for name, contexts in late.items()}
