"""What is asked of CUDA to time calls there, on a torch.cuda that only takes notes."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from lora_ext import measure

DEVICE = torch.device("cuda", 1)
L2 = 50 << 20


class Notes(list):
    """What happened, in order; and torch as `measure` uses it, on the CPU."""

    def __init__(self, refused=()):
        super().__init__()
        self.refused, self.graphs = refused, 0
        notes = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                notes.append("event")

            def elapsed_time(self, end):
                return 0.002

        class CUDAGraph:
            def __init__(self):
                notes.graphs += 1
                self.replay = lambda number=notes.graphs: notes.append(f"replay {number}")

        @contextmanager
        def graph(graph, pool, stream):
            before = len(notes)
            yield
            if any(each in self.refused for each in notes[before:]):
                raise RuntimeError("operation not permitted when stream is capturing")

        def made(*size, dtype, device):
            assert device == DEVICE and dtype == torch.float32
            return torch.zeros(*size, dtype=dtype)

        def sum_of(tensor, dim, out):
            notes.append("read")
            assert 4 * tensor.numel() >= 2 * L2 and out.numel() == 1
            return torch.sum(tensor[:8], dim=dim, out=out)

        properties = SimpleNamespace(L2_cache_size=L2)
        self.torch = SimpleNamespace(float32=torch.float32, zeros=made, sum=sum_of)
        self.torch.cuda = SimpleNamespace(
            Event=Event,
            CUDAGraph=CUDAGraph,
            graph=graph,
            Stream=lambda device: device,
            graph_pool_handle=object,
            device=lambda device: nullcontext(self.append(f"on {device}")),
            get_device_properties=lambda device: properties,
            synchronize=lambda device: self.append("synchronised"),
        )

    def time(self, monkeypatch, **words):
        monkeypatch.setattr(measure, "torch", self.torch)
        calls = {name: lambda name=name: self.append(name) for name in ("a", "b")}
        us = measure.interleaved_us(
            calls, DEVICE, lambda name: self.append(f"prepare {name}"), **words
        )
        assert us == {"a": [2.0] * 25, "b": [2.0] * 25}
        assert self[0] == "on cuda:1" and self[-1] == "synchronised"
        warmed_up = ["prepare a", "a", "a", "a", "prepare b", "b", "b", "b"]
        assert self[1:9] == warmed_up
        return self[9:-1]


def test_a_call_is_timed_behind_a_read_of_more_than_l2_which_writes_nothing(monkeypatch):
    done = Notes().time(monkeypatch)
    rounds = [done[i : i + 5] for i in range(0, len(done), 5)]
    assert len(rounds) == 50
    for prepared, *timed in rounds:
        assert timed == ["read", "event", prepared.removeprefix("prepare "), "event"]


def test_what_can_be_captured_is_timed_as_replays_for_which_nothing_is_prepared(monkeypatch):
    done = Notes().time(monkeypatch, capture=True)
    assert done[:4] == ["prepare a", "a", "prepare b", "b"]
    rounds = [done[i : i + 4] for i in range(4, len(done), 4)]
    assert len(rounds) == 50
    for read, start, replay, end in rounds:
        assert (read, start, end) == ("read", "event", "event")
        assert replay in ("replay 1", "replay 2")


@pytest.mark.parametrize("refused", ["a", "b"])
def test_if_one_cannot_be_captured_all_are_timed_as_they_are(monkeypatch, refused):
    done = Notes(refused={refused}).time(monkeypatch, capture=True)
    assert not any(each.startswith("replay") for each in done)
    assert done[-250:] == Notes().time(monkeypatch)
