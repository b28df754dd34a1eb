"""Measure the host memory that loading takes. As a script, in a fresh process, print it as JSON.

python tests/helpers/host_memory.py MLLM VAE GENERATOR prints by how many bytes the private memory
of the process grows at the peak of each way to load these folders, which hold float32.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch


def private_bytes() -> int:
    """Return the memory that this process shares with no file."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Anonymous in smaps_rollup")


def mappings() -> dict[range, tuple[str, int]]:
    """Return {addresses: (file or "", private bytes)} of this process."""
    found, addresses, path = {}, range(0), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if head == "Anonymous:":
            found[addresses] = (path, int(rest.split()[0]) * 1024)
        elif not head.endswith(":"):
            low, high = (int(number, 16) for number in head.split("-"))
            fields = rest.split(maxsplit=4)
            addresses = range(low, high)
            # Others are called [heap] or have no name.
            path = fields[4] if len(fields) > 4 and fields[4].startswith("/") else ""
    return found


def mapped_from(tensor: torch.Tensor) -> tuple[str, int]:
    """Return the file that holds a tensor, "" if none, and the private bytes of its mapping."""
    address = tensor.data_ptr()
    return next(place for addresses, place in mappings().items() if address in addresses)


def peak_growth(load: Callable[[], object]) -> int:
    """Return by how many bytes the private memory exceeds its start while `load` runs."""
    before = peak = private_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = load()
    peak = max(peak, private_bytes())
    done.set()
    watcher.join()
    del kept
    return peak - before


def main(mllm: str, vae: str, generator: str) -> None:
    from iomm.engine.builders import build_model
    from iomm.engine.config import load_config
    from iomm.internvl import load_mllm
    from iomm.vae import load_vae
    from iomm.weights import load_generator

    torch.set_num_threads(1)
    half, config = torch.bfloat16, load_config("demo", ["model.preset=iomm-b-quarter"])
    # What is imported late does not count.
    build_model(load_config("demo"), "meta")
    ways = {
        "MLLM, CPU": lambda: load_mllm(mllm, dtype=torch.float32),
        "MLLM, cast, device": lambda: load_mllm(mllm, dtype=half, device="meta"),
        "VAE, cast, device": lambda: load_vae(vae, dtype=half, device="meta"),
        "generator, CPU": lambda: load_generator(generator),
        "generator, cast, device": lambda: load_generator(generator, dtype=half, device="meta"),
        "trained parts, device": lambda: build_model(config, "meta"),
    }
    print(json.dumps({name: peak_growth(load) for name, load in ways.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
