"""Tests that every Triton kernel compiles for sm_80 and sm_90 with every tile size.

Kernels must not spill, must use tensor cores, and must fit in shared memory. They are compiled
without a GPU. The default tile of every kernel at head dim 128 is tested by default; the others
are marked slow.
"""

import importlib

import pytest
from offline import compile_for

from iomm.kernels.triton_ops import support as triton_support

pytestmark = pytest.mark.skipif(
    triton_support.INTERPRETED or triton_support.why_not() is not None,
    reason="needs Triton's compiler (not the interpreter)",
)

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TYPES = {"scale": "fp32", "scale_log2": "fp32", "eps": "fp32"}


def argument_type(name, half="bf16"):
    """Return the type of an argument by its name.

    Counts and strides are ints, sums are float32, offsets are int32, and every other pointer is
    half.
    """
    if name in TYPES:
        return TYPES[name]
    if name.startswith("num_") or name.endswith("_stride"):
        return "i32"
    if name.endswith("offsets"):
        return "*i32"
    if name.startswith(("lse", "delta", "cos", "sin", "partial", "loss")):
        return "*fp32"
    return f"*{half}"


def check(kernel, constants, arch, warps, stages, products=False, half="bf16"):
    assert set(constants) <= set(kernel.arg_names), set(constants) - set(kernel.arg_names)
    types = {name: argument_type(name, half) for name in kernel.arg_names if name not in constants}
    compiled = compile_for(kernel, types, constants, capability=arch, warps=warps, stages=stages)
    assert compiled.stack_bytes == 0, f"spills {compiled.stack_bytes} bytes"
    assert compiled.shared_bytes <= SHARED_LIMIT[arch], (
        f"{compiled.shared_bytes} bytes of shared memory"
    )
    if products:
        assert ("wgmma.mma" if arch == 90 else "mma.sync") in compiled.ptx, "no tensor cores"


def attention_kernel(kind):
    from iomm.kernels.triton_ops import attention_backward as backward
    from iomm.kernels.triton_ops import attention_forward as forward

    return {
        "forward": forward.forward_kernel,
        "queries": backward.queries_kernel,
        "keys": backward.keys_kernel,
    }[kind]


def attention_cases(default_only):
    """Yield (arch, kernel, head dim, tile index, variant) of the default or all other cases."""
    if not triton_support.why_not():
        from iomm.kernels.triton_ops.tiles import CANDIDATES

        for (arch, kind, dim), tiles in CANDIDATES.items():
            variants = (
                ["causal", "both", "prefix", "suffix"]
                if kind != "keys"
                else ["causal", "both", "prefix"]
            )
            for index in range(len(tiles)):
                for variant in variants:
                    is_default = dim == 128 and index == 0 and variant == "causal"
                    if is_default == default_only:
                        yield arch, kind, dim, index, variant


def check_attention(arch, kind, dim, index, variant):
    from iomm.kernels.triton_ops.tiles import CANDIDATES

    tile = CANDIDATES[arch, kind, dim][index]
    constants = {
        "SAMPLES": 64,
        "HEADS": 12,
        "KEY_HEADS": 12 if variant == "prefix" else 2,
        "E": dim,
        "CAUSAL": variant == "causal",
        "OWN": tile.own,
        "WALK": tile.walk,
    }
    if kind != "keys":
        constants |= {"PREFIX": variant != "suffix", "SUFFIX": variant != "prefix"}
        constants |= {
            name: None for name in ("prefix_k", "prefix_v", "prefix_offsets") if variant == "suffix"
        }
        constants |= {name: None for name in ("k_ptr", "v_ptr") if variant == "prefix"}
    check(attention_kernel(kind), constants, arch, tile.warps, tile.stages, products=True)


@pytest.mark.parametrize(("arch", "kind", "dim", "index", "variant"), list(attention_cases(True)))
def test_attention_compiles_with_default_tile(arch, kind, dim, index, variant):
    check_attention(arch, kind, dim, index, variant)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kind", "dim", "index", "variant"), list(attention_cases(False)))
def test_attention_compiles_with_every_tile(arch, kind, dim, index, variant):
    check_attention(arch, kind, dim, index, variant)


def row_cases():
    """Return (op, pass, arch, width or head dim, variant) of all cases.

    bf16 at the first width is tested by default.
    """
    return list(_row_cases())


def _row_cases():
    for arch in (80, 90):
        for direction in ("forward", "backward"):
            for width in (1536, 192, 2048, 3840):
                yield "norm_modulate", direction, arch, width, True
            yield "norm_modulate", direction, arch, 3840, False
            for dim in (128, 64, 32):
                for variant in (True, False):
                    yield "qk_norm_rope", direction, arch, dim, variant


def check_rows(op, direction, arch, width, variant, half="bf16"):
    """Check one row kernel.

    With `variant`, norm_modulate uses layer norm with a shift instead of RMS norm, and
    qk_norm_rope handles latents instead of a kv condition.
    """
    module = importlib.import_module(f"iomm.kernels.triton_ops.{op}")
    fused = importlib.import_module(f"iomm.kernels.{op}")
    kernel = getattr(module, f"{direction}_kernel")
    warps = triton_support.warps_for(width)
    constants = {"D": width, "BLOCK": triton_support.power_of_2(width)}
    if op == "norm_modulate":
        constants |= {
            "ROWS": getattr(fused, f"ROWS_{direction.upper()}"),
            "LAYER": variant,
            "SHIFT": variant,
        }
        if not variant:
            constants |= {
                name: None for name in kernel.arg_names if name in ("shift_ptr", "partial_shift")
            }
    elif op == "qk_norm_rope":
        constants = {
            "HEADS": 12,
            "E": width,
            "PARTS": 3 if variant else 2,
            "ROWS": fused.ROWS,
            "Q_WEIGHT": variant,
            "K_WEIGHT": True,
            "ROTATE": variant,
        }
        warps = fused.WARPS
        if not variant:
            absent = "q_weight", "cos_ptr", "sin_ptr", "partial_q"
            constants |= {name: None for name in kernel.arg_names if name in absent}
    check(kernel, constants, arch, warps, 3, half=half)


@pytest.mark.parametrize(
    ("op", "direction", "arch", "width", "variant"),
    [case for case in row_cases() if case[3] in (1536, 128) and case[4]],
)
def test_row_kernels_compile_at_default_width(op, direction, arch, width, variant):
    check_rows(op, direction, arch, width, variant)


@pytest.mark.slow
@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize(("op", "direction", "arch", "width", "variant"), row_cases())
def test_row_kernels_compile_at_every_width(op, direction, arch, width, variant, half):
    check_rows(op, direction, arch, width, variant, half)
