"""Timing on a CUDA device: events around each call, and a call as a graph's replay."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_ext.measure import evicting

from .timing import Function, Sample


class CudaMeter:
    """CUDA events on the current stream, around each call by itself.

    Before a call the L2 cache is evicted, so that the call finds none of its operands there;
    weights, too, which a rotation of inputs would leave in place. While that runs, the host
    prepares the call: of the host's time only what exceeds it is seen.
    """

    def __init__(self) -> None:
        self._evict = evicting(torch.device("cuda", torch.cuda.current_device()))

    def __call__(self, function: Function, inner: int) -> Sample:
        """Time `inner` calls."""
        times = []
        torch.cuda.synchronize()
        for _ in range(inner):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._evict()
            start.record()
            function()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return Sample(sum(start.elapsed_time(end) for start, end in times) / inner, 0.0)


def captured(make: Callable[[], Function]) -> Function:
    """The replay of a CUDA graph of one call: what is left of a call without the host.

    make: how to get the function to capture. It is called on the capture's own stream, because
        autograd runs backward on the stream of the forward.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = make()
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    torch.cuda.synchronize()
    return graph.replay
