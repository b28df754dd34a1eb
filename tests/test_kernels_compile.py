"""Every Triton kernel with every tile it may get compiles for sm_80 and sm_90: no spills, on the tensor cores, and it fits.

Compiled without a GPU. The default tile of every kernel at head dim 128 is a default test; the others are slow."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from iomm.kernels import triton_support  # noqa: E402

pytestmark = pytest.mark.skipif(triton_support.INTERPRETED, reason="the interpreter compiles nothing")

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TYPES = {"scale": "fp32", "scale_log2": "fp32", "eps": "fp32"}


def argument_type(name, half="bf16"):
    """Type by name: what counts is an int, sums are float32, offsets int32, every other pointer is half."""
    if name in TYPES:
        return TYPES[name]
    if name.startswith("num_") or name.endswith("_stride"):
        return "i32"
    if name.endswith("offsets"):
        return "*i32"
    if name.startswith(("lse", "delta", "cos", "sin", "partial", "loss")):
        return "*fp32"
    return f"*{half}"


def compiled(kernel, constants, arch, warps, stages):
    """The kernel as `triton.compile` makes it, all pointers on 16 bytes as PyTorch allocates them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(constants) <= set(names), set(constants) - set(names)
    signature = {name: "constexpr" if name in constants else argument_type(name) for name in names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check(kernel, constants, arch, warps, stages, tmp_path, products=False):
    done = compiled(kernel, constants, arch, warps, stages)
    assert done.metadata.shared <= SHARED_LIMIT[arch], f"{done.metadata.shared} bytes of shared memory"
    if products:
        assert ("wgmma.mma" if arch == 90 else "mma.sync") in done.asm["ptx"], "no tensor cores"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(done.asm["cubin"])
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    said = subprocess.run([folder / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    assert usage and usage[2] == usage[4] == "0", f"spills: {said}"


def attention_kernel(kind):
    from iomm.kernels.masked_attention import backward, forward
    return {"forward": forward.forward_kernel, "queries": backward.queries_kernel, "keys": backward.keys_kernel}[kind]


def attention_cases(first_only):
    """(arch, kernel, head dim, index of the tile, variant) of everything that may be launched, or of defaults alone."""
    if not triton_support.why_not():
        from iomm.kernels.masked_attention.tiles import CANDIDATES
        for (arch, kind, dim), tiles in CANDIDATES.items():
            variants = ["causal", "both", "prefix", "suffix"] if kind != "keys" else ["causal", "both"]
            for index in range(len(tiles)):
                for variant in variants:
                    usual = dim == 128 and index == 0 and variant == "causal"
                    if usual == first_only:
                        yield arch, kind, dim, index, variant


def check_attention(arch, kind, dim, index, variant, tmp_path):
    from iomm.kernels.masked_attention.tiles import CANDIDATES
    tile = CANDIDATES[arch, kind, dim][index]
    constants = {"SAMPLES": 64, "HEADS": 12, "KEY_HEADS": 2, "E": dim, "CAUSAL": variant == "causal", "OWN": tile.own,
                 "WALK": tile.walk}
    if kind != "keys":
        constants |= {"PREFIX": variant != "suffix", "SUFFIX": variant != "prefix"}
        constants |= {name: None for name in ("prefix_k", "prefix_v", "prefix_offsets") if variant == "suffix"}
        constants |= {name: None for name in ("k_ptr", "v_ptr") if variant == "prefix"}
    check(attention_kernel(kind), constants, arch, tile.warps, tile.stages, tmp_path, products=True)


@pytest.mark.parametrize(("arch", "kind", "dim", "index", "variant"), list(attention_cases(True)))
def test_attention(arch, kind, dim, index, variant, tmp_path):
    check_attention(arch, kind, dim, index, variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kind", "dim", "index", "variant"), list(attention_cases(False)))
def test_attention_with_every_tile(arch, kind, dim, index, variant, tmp_path):
    check_attention(arch, kind, dim, index, variant, tmp_path)
