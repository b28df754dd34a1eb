"""Compiles a Triton kernel for a GPU that is not there, and says what it needs: registers, spills, shared memory."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel."""

    ptx: str
    registers: int
    # Spills and arrays that found no registers.
    stack_bytes: int
    shared_bytes: int


def compile_for(kernel, types, constants, *, capability, warps, stages):
    """`kernel` (a @triton.jit function) for compute capability 80, 90, ...; nothing is launched.

    types: argument name -> "*bf16", "*fp32", "i32", "fp32" ...; constants: the constexpr arguments, and None for
    tensors that are left out. Pointers are taken to be aligned to 16 bytes, as PyTorch allocates them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name][0] == "*"
    }
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(done.asm["cubin"])
        cubin.flush()
        said = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said).groups()
    )
    return Compiled(done.asm["ptx"], registers, stack + local, done.metadata.shared)
