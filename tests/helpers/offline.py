"""Compile a Triton kernel without a GPU and report its registers, spills and memory."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """What a thread of a kernel takes."""

    registers: int
    # Spills, and arrays that do not fit in registers.
    stack_bytes: int


@dataclass(frozen=True)
class Compiled(Resources):
    """Resource usage and PTX of a compiled kernel."""

    ptx: str
    shared_bytes: int


def compile_for(kernel, types, constants, *, capability, warps, stages):
    """Compile a kernel for a compute capability without launching it.

    Pointers are assumed to be aligned to 16 bytes, as PyTorch allocates them.

    Args:
        kernel: A @triton.jit function.
        types: Argument name -> type, for example "*bf16", "*fp32", "i32" or "fp32".
        constants: The constexpr arguments, and None for tensors that are omitted.
        capability: Compute capability, for example 80 or 90.
        warps: Warps per program.
        stages: Pipeline stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name][0] == "*"
    }
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = resources(compiled.asm["cubin"])
    return Compiled(
        found.registers, found.stack_bytes, compiled.asm["ptx"], compiled.metadata.shared
    )


def resources(cubin):
    """Return the Resources of a compiled kernel's machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output).groups()
    )
    return Resources(registers, stack + local)


def pretend_driver(capability):
    """Make Triton compile for a compute capability wherever it asks for the current device."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

    triton.runtime.driver.set_active(Driver())
