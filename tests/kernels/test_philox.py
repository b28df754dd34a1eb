"""Tests of philox: known answers, equal numbers on every backend, and their distribution."""

import pytest
import torch

from iomm.kernels import dispatch, native
from iomm.kernels.philox import normal, normal_from_words, philox_reference, philox_words, uniform

pytestmark = pytest.mark.usefixtures("poison")

SAMPLES = torch.tensor([0, 1, 2**31, 2**40 + 7, 2**62])
SEEDS = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]


def ulps(a, b):
    """Return the largest distance of two float32 tensors in units in the last place.

    Signs may differ only at zero.
    """

    def ordered(x):
        bits = x.contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return int((ordered(a) - ordered(b)).abs().max())


def needs(device):
    return pytest.mark.skipif(
        native.why_not(device) is not None, reason=str(native.why_not(device))
    )


# The published test vectors of philox4x32-10 (Random123).
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_words_match_published_vectors(counter, key, words, monkeypatch):
    block, stream, low, high = counter
    n = (high << 32 | low) - (high >> 31 << 64)
    # torch.arange numbers the blocks, so this turns block 0 into `block`.
    real = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, **kwargs: real(*args, **kwargs) + block)
    got = philox_words(key[1] << 32 | key[0], stream, torch.tensor([n]), 1).flatten()
    assert [f"{word:08x}" for word in got.tolist()] == words.split()


@needs("cpu")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 3, 4, 255, 257, 1000])
def test_uniform_matches_reference_bitwise(seed, count):
    got = uniform(seed, 3, SAMPLES, count)
    assert got.shape == (5, count) and got.min() >= 0 and got.max() < 1
    assert torch.equal(got, philox_reference("uniform", seed, 3, SAMPLES, count))


@needs("cpu")
@pytest.mark.parametrize("seed", SEEDS)
def test_normal_matches_reference_to_two_ulp(seed):
    got = normal(seed, 2, SAMPLES, 20_001)
    assert ulps(got, philox_reference("normal", seed, 2, SAMPLES, 20_001)) <= 2


@needs("cpu")
def test_cpu_builds_draw_equal_bits():
    # A process loads one build, so both are called directly here.
    import ctypes

    count, out = 4099, []
    n = torch.arange(3)
    for name in native.build_facts()["built"]:
        if name.startswith("libiomm_cpu") and (
            name == "libiomm_cpu.so" or native.cpu_library_name() == name
        ):
            values = torch.empty(3, count)
            arguments = (7, 2, n.data_ptr(), 3, count, values.data_ptr(), 1)
            ctypes.CDLL(str(native.FOLDER / name)).iomm_philox_normal_cpu(
                *map(ctypes.c_int64, arguments)
            )
            out.append(values)
    assert len(out) >= 1 and not out[0].isnan().any()
    assert all(torch.equal(out[0], values) for values in out)


def test_normal_at_extreme_words():
    top, quarter = 0xFFFFFFFF, 1 << 30
    a = torch.tensor([0, top, top, 0x7FFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF])
    b = torch.tensor([0, 0, top, 0, quarter, 2 * quarter, 3 * quarter])
    z = normal_from_words(torch.stack((a, b), -1))
    assert z.isfinite().all()
    # The largest possible value.
    assert z[0, 0].item() == pytest.approx(5.768, abs=1e-3)
    assert z[1].tolist() == [0, 0]
    r = z[3, 0].item()
    assert r == pytest.approx(1.17741, abs=1e-5)
    assert z[3:].tolist() == [[r, 0], [0, r], [-r, 0], [0, -r]]


def test_sample_is_independent_of_batch_and_count():
    whole = normal(5, 2, torch.arange(10), 300)
    assert torch.equal(normal(5, 2, torch.tensor([7, 3]), 300), whole[[7, 3]])
    assert torch.equal(normal(5, 2, torch.arange(10), 77), whole[:, :77])


def test_streams_seeds_and_samples_are_uncorrelated():
    n = torch.tensor([0, 1, 2**32])
    draws = torch.cat(
        [uniform(seed, stream, n, 10_000) for seed in (0, 2**32) for stream in (0, 1)]
    )
    correlation = torch.corrcoef(draws.double()) - torch.eye(12)
    # Five standard deviations.
    assert correlation.abs().max() < 0.05


def test_moments_match_distribution():
    u, z = (
        uniform(1, 0, torch.arange(16), 65_536).double(),
        normal(1, 2, torch.arange(16), 65_536).double(),
    )
    assert abs(u.mean() - 1 / 2) < 2e-3 and abs(u.var() - 1 / 12) < 1e-3
    assert abs(z.mean()) < 5e-3 and abs(z.var() - 1) < 7e-3
    assert abs((z**3).mean()) < 2e-2 and abs((z**4).mean() - 3) < 5e-2


def test_empty_shapes_return_empty_tensors():
    assert uniform(1, 0, torch.arange(3), 0).shape == (3, 0)
    assert normal(1, 0, torch.arange(0), 5).shape == (0, 5)


@pytest.mark.parametrize(
    ("seed", "n"),
    [
        (-1, torch.arange(2)),
        (2**64, torch.arange(2)),
        (1.5, torch.arange(2)),
        (1, torch.arange(2).int()),
        (1, torch.zeros(1, 1, dtype=torch.int64)),
    ],
)
def test_bad_input_raises_value_error(seed, n):
    with pytest.raises(ValueError, match="must be"):
        uniform(seed, 0, n, 4)


@needs("cpu")
def test_op_passes_opcheck():
    torch.library.opcheck(torch.ops.iomm.philox.default, ("normal", 3, 2, torch.arange(3), 10))


def test_table_lists_every_op_with_reasons():
    rows = dispatch.table(torch.device("cpu"))
    assert [row[0] for row in rows] == dispatch.ops()
    for _, device, _, others in rows:
        assert device == "cpu" and all(reason for _, reason in others)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("philox", "op:backend"),
        ("nonsense:cpp", "unknown op 'nonsense'"),
        ("philox:nonsense", "unknown backend 'nonsense'"),
        ("philox:cuda", "cannot run on cpu"),
    ],
)
def test_invalid_override_raises_value_error(value, message, monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", value)
    with pytest.raises(ValueError, match=message):
        uniform(1, 0, torch.arange(2), 4)


def test_override_forces_backend(monkeypatch):
    monkeypatch.setenv("IOMM_KERNELS", "philox:reference")
    assert dispatch.pick("philox", torch.device("cpu")) is philox_reference
    row = next(row for row in dispatch.table() if row[0] == "philox")
    assert row[2] == "reference"
    assert ("cuda", "supports only cuda") in row[3]
