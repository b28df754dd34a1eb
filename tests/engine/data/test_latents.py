"""Cached latents give the same batches, and the same losses up to the rounding of the latents.

Caches are written by any number of ranks, resumed and verified.
"""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from launches import PIXELS
from toy_models import qwen_autoencoder

from iomm.adapter import QueryAdapter
from iomm.config import PRESETS, AdapterConfig, InputError, MaskConfig
from iomm.engine import cli
from iomm.engine.builders import write_latents
from iomm.engine.config import load_config, parse
from iomm.engine.data import latents as latents_module
from iomm.engine.data.index import build
from iomm.engine.data.latents import EncodedSamples, LatentStore, write_cache
from iomm.engine.data.mixture import Joined, MixtureSampler
from iomm.engine.data.samplers import EpochPermutation, FixedSizeSampler
from iomm.engine.data.shards import Damaged, Shards
from iomm.engine.data.source import ImageSource
from iomm.engine.shapes.dataset import write_dataset
from iomm.engine.shapes.mllm import WEIGHTS
from iomm.generator import new_generator
from iomm.internvl import load_mllm
from iomm.model import IOMM, Recipe
from iomm.vae import QwenVAE, load_vae

SIZE_PX = 32


@pytest.fixture(scope="module")
def vae():
    return load_vae("pixel:4")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    return Shards(
        build(
            write_dataset(folder / "tars", num_images=30, size_px=48, shard_size=16),
            folder / "index",
            progress=False,
        )
    )


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(latents_module, "ROWS", 8)


def write(dataset, out, vae, **options):
    return write_cache(
        dataset, out, vae, **{"vae_name": "pixel:4", "size_px": SIZE_PX, "batch": 3} | options
    )


def store(dataset, out):
    return LatentStore(out, dataset.index, vae="pixel:4", size_px=SIZE_PX)


def batches(dataset, latents=None, num_steps=4, **options):
    return list(
        ImageSource(
            dataset,
            seed=1,
            global_batch=8,
            micro_batch=4,
            rank=0,
            world_size=1,
            size_px=SIZE_PX,
            vit_px=32,
            device="cpu",
            num_steps=num_steps,
            latents=latents,
            **options,
        )
    )


@pytest.fixture(scope="module")
def mllm():
    return load_mllm(str(WEIGHTS), dtype=torch.float32)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return Shards(
        build(
            write_dataset(folder / "tars", num_images=9, size_px=48, seed=5),
            folder / "index",
            progress=False,
        )
    )


def tiny_model(mllm, vae):
    shape = replace(PRESETS["demo"], token_dim=vae.token_dim, condition_dim=mllm.width)
    settings = AdapterConfig(num_queries=8, head_dim=32)
    adapter = QueryAdapter(settings, mllm.width)
    adapter.init_weights(0)
    return IOMM(
        new_generator(shape, 0),
        adapter,
        mllm,
        vae,
        Recipe(mask=MaskConfig(ratio=0.5), adapter=settings),
    )


def in_memory(shards, mllm, vae, rank=0, size=1, others=()):
    ranks = SimpleNamespace(rank=rank, size=size, all=lambda value: [*others, value])
    return EncodedSamples(shards, mllm, vae, size_px=SIZE_PX, ranks=ranks, batch=4)


def test_encoded_mixture_matches_the_batches_and_loss_of_pixels(dataset, pairs, mllm, vae):
    """Latents are bitwise equal. Image tokens differ by the rounding of a matrix product."""
    both = Joined(dataset, pairs)
    samplers = [
        FixedSizeSampler(EpochPermutation(1, shards.shard_sizes), SIZE_PX)
        for shards in (dataset, pairs)
    ]
    sampler = MixtureSampler(1, 8, 5, *samplers, len(dataset))
    encoded = in_memory(both, mllm, vae)
    assert encoded.num_bytes == 4 * (39 * 3 * SIZE_PX**2 + 30 * mllm.num_image_tokens * mllm.width)
    model = tiny_model(mllm, vae)
    for got, expected in zip(
        batches(both, encoded, sampler=sampler), batches(both, sampler=sampler), strict=True
    ):
        assert (
            got.n_B.tolist() == expected.n_B.tolist()
            and got.entry_B.tolist() == expected.entry_B.tolist()
        )
        assert (
            got.captions == expected.captions
            and got.has_image == expected.has_image
            and not all(got.has_image)
        )
        assert got.pixels_BCHW is None and got.vit_pixels_BHWC is None
        assert torch.equal(got.latents_BCHW, expected.pixels_BCHW)
        torch.testing.assert_close(
            got.image_tokens_IPD, mllm.image_tokens(expected.vit_pixels_BHWC)
        )
        with torch.no_grad():
            torch.testing.assert_close(model(*got.inputs)[1], model(*expected.inputs)[1])


def test_each_rank_encodes_a_share(dataset, mllm, vae):
    parts = []

    def collect(value):
        parts.append(value)
        return [value]

    for rank in (0, 1):
        ranks = SimpleNamespace(rank=rank, size=2, all=collect)
        EncodedSamples(dataset, mllm, vae, size_px=SIZE_PX, ranks=ranks, batch=4)
    ranks = SimpleNamespace(rank=1, size=2, all=lambda value: parts)
    together = EncodedSamples(dataset, mllm, vae, size_px=SIZE_PX, ranks=ranks, batch=4)
    alone = in_memory(dataset, mllm, vae)
    assert [len(part[False][0]) for part in parts] == [15, 15]
    assert torch.equal(together.latents_NCHW, alone.latents_NCHW)
    torch.testing.assert_close(together.tokens_IPD, alone.tokens_IPD)


def test_unreadable_sample_is_replaced_in_every_epoch(dataset, mllm, vae, monkeypatch):
    real = dataset.decodable_bytes

    def broken(k):
        if k == 5:
            raise Damaged("sample 5 is gone")
        return real(k)

    monkeypatch.setattr(dataset, "decodable_bytes", broken)
    encoded = in_memory(dataset, mllm, vae)
    assert encoded.bad == {5}
    seen = batches(dataset, encoded, num_steps=8)
    assert 5 not in [entry for batch in seen for entry in batch.entry_B.tolist()]
    hit = [failure.n for batch in batches(dataset, num_steps=8) for failure in batch.failures]
    assert [failure.n for batch in seen for failure in batch.failures] == hit and len(hit) == 3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_cached_batches_match_those_of_pixels(dataset, vae, tmp_path, dtype):
    assert write(dataset, tmp_path / "cache", vae, dtype=dtype) == 30
    cached = batches(dataset, store(dataset, tmp_path / "cache"))
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for got, expected in zip(cached, batches(dataset), strict=True):
        assert (
            got.n_B.tolist() == expected.n_B.tolist()
            and got.entry_B.tolist() == expected.entry_B.tolist()
        )
        assert got.pixels_BCHW is None and torch.equal(
            got.vit_pixels_BHWC, expected.vit_pixels_BHWC
        )
        assert torch.equal(got.latents_BCHW, vae.encode(expected.pixels_BCHW).to(kind).float())


def test_cache_of_the_qwen_image_vae_matches_its_latents(dataset, tmp_path):
    vae = QwenVAE(qwen_autoencoder())
    out = tmp_path / "cache"
    assert write(dataset, out, vae, vae_name="qwen", dtype="bf16") == 30
    cache = LatentStore(out, dataset.index, vae="qwen", size_px=SIZE_PX)
    for got, expected in zip(
        batches(dataset, cache, num_steps=2), batches(dataset, num_steps=2), strict=True
    ):
        latents = vae.encode(expected.pixels_BCHW)
        assert got.latents_BCHW.shape == (4, 16, SIZE_PX // 8, SIZE_PX // 8)
        assert torch.allclose(got.latents_BCHW.float(), latents, rtol=2**-8, atol=1e-6)


def test_losses_agree_up_to_the_rounding_of_the_latents(dataset, mllm, vae, tmp_path):
    """Training in fp32 on bf16 latents gives exactly the loss of the rounded latents.

    It differs from the loss of the pixels by their rounding, relative 2^-9 of values up to 1.
    """
    write(dataset, tmp_path / "cache", vae)
    model = tiny_model(mllm, vae)
    for got, expected in zip(
        batches(dataset, store(dataset, tmp_path / "cache"), 2),
        batches(dataset, num_steps=2),
        strict=True,
    ):
        with torch.no_grad():
            cached, _, _ = model(got.pixels_BCHW, got.vit_pixels_BHWC, got.n_B, got.latents_BCHW)
            exact, _, _ = model(expected.pixels_BCHW, expected.vit_pixels_BHWC, expected.n_B)
            rounded, _, _ = model(
                expected.pixels_BCHW.bfloat16().float(), expected.vit_pixels_BHWC, expected.n_B
            )
        assert torch.equal(cached, rounded)
        # |d(e^2)| <= 2 e d + d^2
        assert abs(cached - exact) < 2 * exact.sqrt() * 2**-9 + 2**-18


def test_ranks_share_the_work_and_a_stopped_cache_resumes(dataset, vae, tmp_path):
    write(dataset, tmp_path / "whole", vae)
    assert write(dataset, tmp_path / "parts", vae, rank=1, num_ranks=2) == 8 + 6
    with pytest.raises(
        InputError,
        match=(
            r"lacks 2 of 4 files, the first is latents-00000\.safetensors; "
            "run the same `iomm cache` again"
        ),
    ):
        store(dataset, tmp_path / "parts")
    assert write(dataset, tmp_path / "parts", vae, rank=0, num_ranks=2) == 16
    os.remove(tmp_path / "parts" / "latents-00002.safetensors")
    assert write(dataset, tmp_path / "parts", vae) == 8
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "parts").iterdir())) == 5


def test_damaged_latents_and_images_are_replaced(dataset, vae, tmp_path, monkeypatch):
    real = dataset.decodable_bytes

    def broken(k):
        if k == 5:
            raise Damaged("sample 5 is gone")
        return real(k)

    monkeypatch.setattr(dataset, "decodable_bytes", broken)
    write(dataset, tmp_path / "cache", vae)
    monkeypatch.setattr(dataset, "decodable_bytes", real)
    file = tmp_path / "cache" / "latents-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    # Latents of entry 15.
    file.write_bytes(data)
    with open(tmp_path / "cache" / "latents-00003.safetensors", "r+b") as f:
        # Entries 24 to 29.
        f.truncate(600)
    cached = store(dataset, tmp_path / "cache")
    bad = {5, 15, *range(24, 30)}
    for k in range(30):
        if k in bad:
            with pytest.raises(Damaged, match="latents"):
                cached.read(k)
        else:
            assert cached.read(k).shape == (3, SIZE_PX, SIZE_PX)
    failures = [failure for batch in batches(dataset, cached) for failure in batch.failures]
    hit = [
        n
        for batch in batches(dataset)
        for n, entry in zip(batch.n_B.tolist(), batch.entry_B.tolist(), strict=True)
        if entry in bad
    ]
    assert [failure.n for failure in failures] == hit and not any(
        failure.fatal for failure in failures
    )


def test_wrong_caches_raise_input_error(dataset, vae, tmp_path):
    write(dataset, tmp_path / "cache", vae)
    with pytest.raises(
        InputError, match=r"made with different settings .*dtype is 'bf16', expected 'fp16'"
    ):
        write(dataset, tmp_path / "cache", vae, dtype="fp16")
    with pytest.raises(
        InputError, match=r"made with different settings .*size_px is 32, expected 64"
    ):
        LatentStore(tmp_path / "cache", dataset.index, vae="pixel:4", size_px=64)
    with pytest.raises(InputError, match=r"has no latents\.json; create it with `iomm cache`"):
        store(dataset, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="mine holds other files"):
        write(dataset, tmp_path / "mine", vae)
    with pytest.raises(InputError, match=r"set data\.flip=false"):
        batches(dataset, store(dataset, tmp_path / "cache"), flip=True)
    with pytest.raises(InputError, match=r"data\.latents holds latents of unflipped centre crops"):
        parse("data: {latents: memory, crop: random}")
    with pytest.raises(InputError, match=r"leave data\.pairs out, set data\.latents=memory"):
        parse("data: {latents: x, pairs: shapes}")
    with pytest.raises(InputError, match=r"data\.latents=memory, or leave data\.latents out"):
        parse("data: {latents: x}\ntrain: {data: pair}")


def test_cache_command(tmp_path, capsys):
    settings = [f"run.dir={tmp_path / 'run'}", "data.num_images=20"]
    for rank in ("0", "1"):
        assert (
            cli.main(
                [
                    "cache",
                    "--config",
                    PIXELS,
                    "--out",
                    str(tmp_path / "cache"),
                    "--rank",
                    rank,
                    "--ranks",
                    "2",
                    *settings,
                ]
            )
            == 0
        )
    assert "rank 1 of 2: 8 of 20 latents written" in capsys.readouterr().out
    assert "0 of 20 latents" in write_latents(
        load_config(PIXELS, settings), tmp_path / "cache", dtype="bf16", batch=4
    )
    assert (
        cli.main(
            [
                "cache",
                "--config",
                PIXELS,
                "--out",
                str(tmp_path / "cache"),
                "--rank",
                "2",
                "--ranks",
                "2",
                *settings,
            ]
        )
        == 2
    )
    assert "--rank must be from 0 to --ranks - 1, got 2 of 2" in capsys.readouterr().err
