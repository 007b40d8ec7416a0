"""What belongs to one of several devices or streams, and is taken for that of all.

Seen on the emulated runtime, whose devices may be unlike cards.
"""

from emulated.mutants.faults.fault import Fault

CARDS = "kernel_launch.cpp"
COUNTS = "launch_parts.cpp"
LAUNCH = "kernels/launch/stream_launch.h"


def fault(name: str, what: str, why: str, file: str, *edits: tuple[str, str]) -> Fault:
    return Fault(name, what, why, tuple((file, old, new) for old, new in edits), "cuda")


DEVICES = [
    fault(
        "devices_share_a_card",
        "the first device that is asked for is what all are",
        "they may be unlike",
        CARDS,
        ("cards.try_emplace(index)", "cards.try_emplace(0)"),
    ),
    fault(
        "devices_share_clusters",
        "as many clusters are resident on a device as on the first",
        "another card has other SMs, and other groups of them",
        LAUNCH,
        ("known.find({function, device})", "known.find({function, 0})"),
        ("known.try_emplace({function, device}, most)", "known.try_emplace({function, 0}, most)"),
    ),
    fault(
        "devices_share_counts",
        "counts of graphs are of the first device's memory",
        "they are counted across the bus, if at all",
        COUNTS,
        ("return devices[index];", "return devices[0];"),
    ),
    fault(
        "devices_streams_share_counts",
        "all streams of a device have the same counts",
        "launches on two of them may run side by side",
        COUNTS,
        ("mine.by_stream.find(*stream)", "mine.by_stream.find(0)"),
        ("mine.by_stream.try_emplace(*stream, made)", "mine.by_stream.try_emplace(0, made)"),
    ),
    fault(
        "devices_counts_without_bound",
        "a stream's counts are taken however many are asked for",
        "those of more than a million columns go past them",
        COUNTS,
        ("if (!stream || count > kOfStream) return nullptr;", "if (!stream) return nullptr;"),
    ),
]
