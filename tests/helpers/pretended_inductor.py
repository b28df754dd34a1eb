"""Inductor for the pretended device: kernels are compiled for an H200, launches only counted.

Dynamo, AOTAutograd and Inductor are PyTorch's own; Triton and ptxas compile every kernel that
Inductor generates to machine code of sm_90. Its launches do nothing, so only a dry run makes sense.
"""

from collections import Counter
from dataclasses import dataclass, field

import pretended_cuda
import torch
from offline import pretend_driver, resources
from torch._inductor.runtime import triton_helpers, triton_heuristics


@dataclass
class Kernels(triton_heuristics.CachingAutotunerPlugin):
    """Takes the place of Inductor's launcher."""

    # Per kernel, by its source: the stack bytes of each of its configs.
    stacks: dict[str, list[int]] = field(default_factory=dict)
    launches: Counter[str] = field(default_factory=Counter)

    def pre_compile(self, autotuner):
        """Compile all configs, of which a GPU would time and keep the fastest."""
        if autotuner.fn.src not in self.stacks:
            self.stacks[autotuner.fn.src] = [
                resources(autotuner._precompile_config(config).kernel.asm["cubin"]).stack_bytes
                for config in autotuner.configs
            ]

    def pre_dispatch(self, autotuner, *arguments, stream, **kwargs):
        """Count a launch."""
        self.launches[autotuner.inductor_meta["kernel_name"]] += 1


def install() -> Kernels:
    """Let Inductor generate code for the pretended device, and return what it records."""
    pretend_driver(10 * pretended_cuda.H200.major + pretended_cuda.H200.minor)
    triton_helpers.set_driver_to_gpu = lambda: None
    # Part of the keys of caches.
    torch.version.cuda = "13.0"
    torch._C._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    config = torch._inductor.config
    # In this process, where the kernels are recorded.
    config.compile_threads = 1
    config.fx_graph_cache = False
    config.autotune_local_cache = False
    config.use_static_triton_launcher = False
    torch._functorch.config.enable_autograd_cache = False
    kernels = Kernels()
    triton_heuristics.get_caching_autotuner_plugins = lambda _: [kernels]
    return kernels
