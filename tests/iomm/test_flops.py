"""FLOPs per image at IOMM-B's true shapes, on the meta device.

The results are the table in iomm/README.md, for literal Algorithm 1 and for this implementation.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iomm.adapter import QueryAdapter
from iomm.config import PRESETS, AdapterConfig
from iomm.generator import empty_generator
from iomm.internvl import INTERNVL3_2B, meta_mllm

T = 1e12
TEXT, IMAGE, QUERIES, RATIO = 12, 256, 256, 0.85
LITERAL = TEXT + IMAGE + QUERIES


def counted(work):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / T


@pytest.fixture(scope="module")
def mllm():
    return meta_mllm(**INTERNVL3_2B)


def test_mllm_and_adapter_parameter_counts(mllm):
    assert sum(p.numel() for p in mllm.parameters()) == pytest.approx(1.856e9, rel=0.01)
    with torch.device("meta"):
        adapter = QueryAdapter(AdapterConfig(), mllm.width)
    assert 28.5e6 < sum(p.numel() for p in adapter.parameters()) < 29.5e6


def test_vit_flops_are_within_one_percent(mllm):
    pixels = torch.empty(1, 3, 448, 448, device="meta")
    assert mllm.vit_flops() / T == pytest.approx(
        counted(lambda: mllm.image_tokens(pixels)), rel=0.01
    )


def test_flops_match_the_readme_table(mllm):
    """Print the table of FLOPs per image (pytest -s) and compare it with iomm/README.md.

    Every row is within 2 %, and the MLLM takes at most 0.55 of the literal pass.
    """
    x = torch.empty(1, LITERAL, mllm.width, device="meta", requires_grad=True)
    decoder = mllm.backbone.language_model

    def literal_pass():
        mask = torch.empty(1, 1, LITERAL, LITERAL, device="meta")
        decoder(
            inputs_embeds=x, attention_mask=mask, use_cache=False
        ).last_hidden_state.sum().backward()

    literal_mllm = counted(literal_pass)
    shown = round((1 - RATIO) * IMAGE)
    ours_mllm = sum(mllm.decoder_flops(TEXT + shown, QUERIES)) / T
    generator = empty_generator(
        replace(PRESETS["iomm-b"], token_dim=64, condition_dim=mllm.width), device="meta"
    )
    literal_dit, ours_dit = (
        3 * generator.flops_per_image((32, 32), c) / T for c in (LITERAL, QUERIES)
    )
    # The VAE is counted in tests/iomm/test_vae.py.
    vae, vit = 1.118, mllm.vit_flops() / T
    rows = {
        "VAE encoder forward": (vae, vae),
        "ViT forward": (vit, vit),
        "MLLM": (literal_mllm, ours_mllm),
        "DiT forward + backward": (literal_dit, ours_dit),
    }
    rows["sum"] = tuple(map(sum, zip(*rows.values(), strict=True)))
    print("\nTFLOP per image, stage 1, 512 px       literal    ours")
    for name, (literal, ours) in rows.items():
        print(f"{name:<36} {literal:>9.2f} {ours:>7.2f}")
    stated = {
        "VAE encoder forward": (1.12, 1.12),
        "ViT forward": (0.72, 0.72),
        "MLLM": (2.84, 1.51),
        "DiT forward + backward": (5.85, 4.71),
        "sum": (10.5, 8.1),
    }
    for name, row in rows.items():
        assert row == pytest.approx(stated[name], rel=0.02), name
    assert ours_mllm / literal_mllm <= 0.55
