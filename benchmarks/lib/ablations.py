"""The step of benchmarks/lib/harness.py with one thing changed: each idea switched off, and what is not on by default switched on."""

import os
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice

import torch

from iomm.engine.parallel.prefetch import Prefetcher
from iomm.kernels import dispatch, fp8_linear
from iomm.kernels.masked_attention import masked_attention
from iomm.layers import TokenLinear, use_fp8


@contextmanager
def swapped(thing, **values):
    """Attributes of a thing, other ones for a while."""
    before = {name: getattr(thing, name) for name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


@contextmanager
def bodies(choice):
    """IOMM_KERNELS, another one for a while."""
    before = os.environ.pop("IOMM_KERNELS", None)
    os.environ["IOMM_KERNELS"] = choice
    try:
        yield
    finally:
        del os.environ["IOMM_KERNELS"]
        if before is not None:
            os.environ["IOMM_KERNELS"] = before


@contextmanager
def in_fp8(generator):
    """The generator's products in fp8 for a while; torch.compile makes graphs of that too, in the first step."""
    use_fp8(generator)
    try:
        yield
    finally:
        for part in generator.modules():
            if isinstance(part, TokenLinear):
                # And not False: graphs look at whether a part has one of its own.
                vars(part).pop("fp8", None)


def whole_pass(mllm, queries_BQD, condition, cache, *, causal=True):
    """Like MLLM.queries, without the prefix split: prompt, image tokens and queries in one pass with ordinary autograd."""
    decoder, (batch, num, width) = mllm.backbone.language_model, queries_BQD.shape
    bounds, device = condition.offsets.tolist(), queries_BQD.device
    steps = torch.arange(num, device=device)
    tokens, positions, is_query = [], [], []
    for b, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        tokens += [condition.tokens_TD[start:stop], queries_BQD[b]]
        positions += [condition.positions_T[start:stop], condition.end_B[b] + steps]
        is_query += [torch.zeros(stop - start, dtype=torch.bool), torch.ones(num, dtype=torch.bool)]
    x_SD, rotary = torch.cat(tokens), decoder.rotary_emb(queries_BQD, torch.cat(positions)[None])
    offsets = condition.offsets + num * torch.arange(batch + 1, dtype=torch.int32, device=device)
    for layer in decoder.layers:
        q, k, v = mllm.project_qkv(layer, x_SD, rotary)
        x_SD = mllm.finish_layer(layer, x_SD, masked_attention(q, k, v, offsets, causal=causal))
    return decoder.norm(x_SD)[torch.cat(is_query).to(device)].view(batch, num, width)


def ablations(bench):
    """{row: step with one idea switched off}, and {row: step with something switched on that is not by default}. Those that
    torch.compile makes new graphs for come last. The Triton bodies of row kernels have no row: compiled blocks have chosen
    theirs (benchmarks/ops.py --gpu times them).
    """
    model, mllm, recipe = bench.model, bench.model.frozen[0], bench.model.recipe
    rows = {
        "hidden tokens enter as zeros (mask.mode=zero)": lambda: [
            swapped(model, recipe=replace(recipe, mask=replace(recipe.mask, mode="zero")))
        ],
        "no prefix split": lambda: [
            swapped(
                mllm,
                prefix=lambda condition, outputs=False: (None, None),
                queries=lambda *args, **kind: whole_pass(mllm, *args, **kind),
            )
        ],
    }
    late = {}
    own = [
        f"{op}:reference"
        for op, _, body, _ in dispatch.table(bench.device)
        if body in ("cpp", "cuda")
    ]
    if own:
        rows["no compiled ops of ours"] = lambda: [bodies(",".join(own))]
    else:
        print("no row for our compiled ops: none is in use here (iomm doctor says why)")
    if bench.compiled:
        rows["no torch.compile"] = lambda: [torch.compiler.set_stance("force_eager")]
    if bench.device.type == "cuda":
        for body in ("triton", "varlen"):
            if dict(refusals("masked_attention", bench.device)).get(body, "unknown") is None:
                late[f"masked_attention by {body}"] = lambda body=body: [
                    bodies(f"masked_attention:{body}")
                ]
        if fp8_linear.why_not() is None and bench.config.precision != "fp8":
            late["fp8 in the generator's blocks (precision=fp8)"] = lambda: [
                in_fp8(model.generator)
            ]
    # Last of all: its lengths make graphs for any length, which from then on are taken for one length too.
    late["all outputs condition (adapter.conditions=all)"] = lambda: [
        swapped(model, recipe=replace(recipe, adapter=replace(recipe.adapter, conditions="all")))
    ]

    def inside(contexts):
        def run():
            with ExitStack() as stack:
                for context in contexts():
                    stack.enter_context(context)
                return bench.step()

        return run

    steps = {name: inside(contexts) for name, contexts in rows.items()}
    held = bench.next()
    ready = [
        replace(
            batch,
            latents_BCHW=model.encode(batch.pixels_BCHW, batch.n_B.to(bench.device)).float(),
            pixels_BCHW=None,
        )
        for batch in held
    ]
    steps["latents at hand (data.latents, without its reads)"] = lambda: bench.step(ready)
    if bench.device.type == "cuda":
        ahead = Prefetcher(bench.batches, model.prepare, bench.device)
        steps["encoded ahead on a stream of its own (train.overlap)"] = lambda: bench.step(
            islice(ahead, bench.source.accumulation_steps), ahead.fetch
        )
    return steps | {name: inside(contexts) for name, contexts in late.items()}


def refusals(op, device):
    """[(body, why it cannot run here, or None)]."""
    return [(body.name, body.refusal(device.type, torch.bfloat16)) for body in dispatch._bodies[op]]
