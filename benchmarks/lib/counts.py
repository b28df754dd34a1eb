"""What a step does, in numbers that are the same on every day: python benchmarks/lib/counts.py [--write]

    work        FLOPs of one image by part, at the real shapes, for ours and for plain PyTorch; bytes that autograd keeps
    step        aten calls (views aside), bytes that they read and write, new tensors and FLOPs of one training step of
                demo-cpu on two images, in eager mode on a CPU, by part; and the graph breaks of a generator's blocks

benchmarks/lib/counts.json holds them; tests/benchmarks/test_counts.py compares exactly, and --write makes the file anew: a change that
moves them commits the new numbers. Those of a step hold for one version of torch, which the file names.
"""

from iomm.checkout import enter

ROOT = enter(__file__)

import argparse
import json

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.baseline import BaselineModel
from iomm.config import generator_config
from iomm.engine import dry_run
from iomm.engine.builders import mllm_name, vae_name
from iomm.engine.config import load_config
from iomm.flops import flops_per_image
from iomm.internvl import mllm_without_weights, prompt_tokenizer
from iomm.mllm import IMAGE, RECONSTRUCT, TURN
from iomm.vae import vae_without_weights

FILE = ROOT / "benchmarks/lib/counts.json"
# Write without reading what was there.
BLIND = "aten::copy_", "aten::zero_", "aten::fill_"


class Count(TorchDispatchMode):
    """Counts what runs inside: `calls` of aten and our own ops that are no views, `bytes` that they read and write,
    `tensors` that they make anew. Code of torch.compile is not seen: count in eager mode.
    """

    def __init__(self):
        super().__init__()
        self.calls = self.bytes = self.tensors = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage()._cdata for x in given}
        new = [x for x in made if x.untyped_storage()._cdata not in known]
        writes, written = func._schema.is_mutable, []
        # Gradients count as read alone: AdamW scales them in place only when asked to.
        if writes:
            kinds = {**dict(zip((a.name for a in func._schema.arguments), args)), **(kwargs or {})}
            written = [
                kinds.get(a.name)
                for a in func._schema.arguments
                if a.alias_info is not None and a.alias_info.is_write and a.name != "grads"
            ]
        if new or writes or not made:
            self.calls += 1
            self.tensors += len(new)
            self.bytes += size(given) + (size([written, new]) if writes else size(made))
            self.bytes -= size(written) if func._schema.name in BLIND else 0
        return out


def size(tree):
    """Bytes of all tensors in it."""
    return sum(
        x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)
    )


def plain_flops(config, every=False):
    """FLOPs of one image in benchmarks/lib/baseline.py, forward and backward, counted on the meta device."""
    mllm, vae = (
        mllm_without_weights(mllm_name(config)),
        vae_without_weights(vae_name(config), config.model.patch),
    )
    mllm.tokenizer = prompt_tokenizer()
    shape = generator_config(config.model.preset, token_dim=vae.token_dim, condition_dim=mllm.width)
    size = config.data.size_px
    with torch.device("meta"):
        plain = BaselineModel(
            shape, config.adapter, mllm, vae, ratio=config.mask.ratio, every=every
        )
        # the fused attention of some devices is unknown to the counter; the plain one is two products
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            plain.loss(
                torch.empty(1, 3, size, size), torch.empty(1, 3, mllm.vit_px, mllm.vit_px)
            ).backward()
    return counter.get_total_flops()


def part_flops(model, size_px):
    """IOMM with a tokenizer -> {part: FLOPs of one image}, forward and, where there is one, backward."""
    mllm, vae = model.frozen
    adapter, text = (
        model.recipe.adapter,
        len(mllm.token_ids("".join(TURN) + "".join(IMAGE) + RECONSTRUCT)),
    )
    num_prefix = text + mllm.num_image_tokens * (1 - model.recipe.mask.ratio)
    prefix, forward, backward = mllm.decoder_flops(num_prefix, adapter.num_queries)
    generator = model.generator.flops_per_image(vae.grid(size_px, size_px), adapter.num_queries)
    return {
        "vae": vae.flops_per_image(size_px),
        "vit": mllm.vit_flops(),
        "adapter": 3 * model.adapter.flops(num_prefix),
        "prefix": prefix,
        "suffix": forward + backward,
        "generator": 3 * generator,
    }


def counted(name):
    """A config as it is counted: in float32 where it leaves the precision to the machine."""
    return load_config(name, ["data.shards=shapes"] + ["precision=fp32"] * (name == "demo-cpu"))


def work(name):
    """Of one image: FLOPs by part, and of plain; bytes that autograd keeps of the generator."""
    config = counted(name)
    model = dry_run.build_without_weights(config)
    model.frozen[0].tokenizer = prompt_tokenizer()
    ours = flops_per_image(model, config.data.size_px)
    found = {
        "flops": {
            part: round(flops) for part, flops in part_flops(model, config.data.size_px).items()
        },
        "activation_bytes": dry_run.activation_bytes(model, config, 1),
    }
    for row, every in (("plain", False), ("plain, all outputs", True)):
        found[row] = {"flops": plain_flops(config, every)}
        found[row]["ratio"] = round(found[row]["flops"] / ours, 4)
    return found


def step_counts():
    """Of one step of demo-cpu on two images, without loader and ranks: by part, in eager mode."""
    from iomm.engine import builders
    from iomm.engine.parallel.optim import make_optimizer

    config = counted("demo-cpu")
    model = builders.build_model(config, "cpu")
    mllm, vae = model.frozen
    draw = torch.Generator().manual_seed(0)
    size, batch = config.data.size_px, 2
    pixels = torch.rand(batch, 3, size, size, generator=draw) * 2 - 1
    vit_pixels, n_B = (
        torch.randn(batch, 3, mllm.vit_px, mllm.vit_px, generator=draw),
        torch.arange(batch),
    )
    optimizer = make_optimizer(model, config.optim)
    found = {}

    def count(part, work):
        with Count() as counter:
            result = work()
        found[part] = {"calls": counter.calls, "bytes": counter.bytes, "tensors": counter.tensors}
        return result

    # Plans of attention are made here.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        model(pixels, vit_pixels, n_B)[0].backward()
    found["flops"] = flops.get_total_flops()
    optimizer.step()
    optimizer.zero_grad()
    count("vae", lambda: model.encode(pixels, n_B))
    condition = count("vit and condition", lambda: model.condition(vit_pixels, n_B))
    count("adapter and MLLM", lambda: model.encode_condition(condition))
    loss = count("forward", lambda: model(pixels, vit_pixels, n_B))[0]
    count("backward", loss.backward)
    count("optimizer", optimizer.step)
    return found


def graph_breaks():
    """Of a generator's block, as torch.compile(fullgraph=True) takes it: 0, or this raises."""
    from torch._dynamo.utils import counters

    from iomm.config import GeneratorConfig
    from iomm.generator import new_generator

    generator = new_generator(
        GeneratorConfig(width=64, num_heads=2, num_blocks=2, token_dim=16, condition_dim=32), 0
    )
    counters.clear()
    for block in generator.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    generator(torch.randn(2, 16, 16), torch.rand(2), torch.randn(2, 8, 32), (4, 4)).sum().backward()
    return sum(counters["graph_break"].values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {FILE.relative_to(ROOT)}")
    args = parser.parse_args()
    found = {
        "work": {name: work(name) for name in ("demo-cpu", "iomm-b-512")},
        "step": {
            "torch": torch.__version__.partition("+")[0],
            "demo-cpu": step_counts(),
            "graph_breaks": graph_breaks(),
        },
    }
    text = json.dumps(found, indent=1) + "\n"
    if args.write:
        FILE.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
