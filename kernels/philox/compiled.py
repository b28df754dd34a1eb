"""The C++ and CUDA bodies: one custom op, the library is chosen by the device."""

import torch

from iomm.kernels import native


@torch.library.custom_op("iomm::philox", mutates_args=(), device_types=("cpu", "cuda"))
def philox_compiled(distribution: str, seed: int, stream: int, n_B: torch.Tensor, count: int) -> torch.Tensor:
    out = torch.empty(len(n_B), count, dtype=torch.float32, device=n_B.device)
    native.launch(n_B.device, f"iomm_philox_{distribution}", seed, stream, n_B, len(n_B), count, out)
    return out


@philox_compiled.register_fake
def _(distribution, seed, stream, n_B, count):
    return n_B.new_empty(n_B.shape[0], count, dtype=torch.float32)
