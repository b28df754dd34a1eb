"""Prefetched encoders: the order of work, the prepared batches, and unchanged losses."""

from itertools import chain, islice

import pytest
import torch
from toy_models import build, pixels, walk

from iomm.engine.data.source import Batch
from iomm.engine.loop import train_step
from iomm.engine.parallel.prefetch import Prefetcher
from iomm.internvl import load_mllm


def batches(num, order):
    for i in range(num):
        order.append(f"read {i}")
        yield Batch(
            torch.arange(2 * i, 2 * i + 2),
            torch.zeros(2),
            torch.full((2, 1), float(i)),
            torch.zeros(2, 1),
            wait_s=0.1 * i,
            failures=[i],
        )


class Stub:
    """Replace zero.Sharded, with two micro-batches per step."""

    def __init__(self, order):
        self.order, self.passes = order, 0

    def __call__(self, *inputs):
        name = inputs[0] if len(inputs) == 1 else f"raw {inputs[0][0].item():.0f}"
        self.order.append(f"forward {name}")
        return torch.zeros(()), torch.zeros(2), torch.zeros(2)

    def backward(self, loss):
        self.order.append("backward")

    def step(self):
        self.passes += 1
        self.order.append("step" if self.passes % 2 == 0 else "no step")
        return self.passes % 2 == 0


def test_next_batch_is_encoded_after_the_forward_pass():
    order = []

    def prepare(pixels, *_):
        order.append(f"prepare {pixels[0].item():.0f}")
        return f"prepared {pixels[0].item():.0f}"

    prefetcher = Prefetcher(batches(4, order), prepare, torch.device("cpu"))
    sharded = Stub(order)
    results = [train_step(sharded, islice(prefetcher, 2), None, prefetcher.fetch) for _ in range(2)]
    by_micro_batch = [
        [
            f"forward prepared {i}",
            *([f"read {i + 1}", f"prepare {i + 1}"] if i < 3 else []),
            "backward",
            "step" if i % 2 else "no step",
        ]
        for i in range(4)
    ]
    assert order == ["read 0", "prepare 0", *chain.from_iterable(by_micro_batch)]
    assert [result[3] for result in results] == pytest.approx([0.1, 0.5])
    assert [result[4] for result in results] == [[0, 1], [2, 3]]
    assert [n_B.tolist() for result in results for n_B, _ in result[5]] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    assert next(prefetcher, None) is None
    order.clear()
    train_step(Stub(order), islice(batches(2, order), 2))
    assert order == [
        "read 0",
        "forward raw 0",
        "backward",
        "no step",
        "read 1",
        "forward raw 1",
        "backward",
        "step",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_do_not_race(mllm_folder):
    """With a delayed training stream, encoders run far ahead of it, and losses are unchanged."""
    model = build(load_mllm(str(mllm_folder), dtype=torch.float32, device="cuda")).cuda()

    def stream_of_batches():
        for i in range(12):
            n_B = torch.arange(4 * i, 4 * i + 4)
            yield Batch(n_B, n_B, *(x.cuda() for x in pixels(n_B)), wait_s=0.0)

    expected = [model(*batch.inputs)[1] for batch in stream_of_batches()]
    prefetcher = Prefetcher(stream_of_batches(), model.prepare, torch.device("cuda"))
    found = []
    for batch in prefetcher:
        torch.cuda._sleep(10**8)
        loss, loss_B, _ = model(*batch.inputs)
        loss.backward()
        found.append(loss_B)
        del batch
        prefetcher.fetch()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "settings", [{}, dict(conditions="all"), dict(conditions="all", kind="none")], ids=str
)
def test_prepared_batches_give_the_same_loss_and_gradients(mllm, settings):
    model, n_B = build(mllm, **settings), torch.arange(4)
    prepared = model.prepare(*pixels(n_B), n_B)
    assert {id(x) for x in walk(prepared)} == {id(x) for x in prepared.tensors()}
    assert not any(x.requires_grad for x in prepared.tensors())
    found = []
    for inputs in ((prepared,), (*pixels(n_B), n_B)):
        model.zero_grad()
        loss, loss_B, t_B = model(*inputs)
        loss.backward()
        found.append(
            [
                loss.detach(),
                loss_B,
                t_B,
                *(p.grad.clone() for p in model.parameters() if p.grad is not None),
            ]
        )
    assert len(found[0]) > 20 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
