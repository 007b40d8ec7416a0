"""Checks CUDA kernels before their first use, by default in a separate process.

A process whose kernels hang or fault can no longer use its device. So a child process computes the
small cases (csrc/op/check/kernel_check.h), this process keeps the results, and a lost child costs
one check.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

import lora_ext._C as _C

from ..device import indexed, need_kernels
from .isolated import CannotStart, ChildLost, answers

TIMEOUT_S = 10.0
# After this number of lost children no more are started: they would be lost as well.
_MOST_LOST = 4
_CHILD = "from lora_ext.kernels.kernel_checks import serve; serve()"
_UNKNOWN = "could not be checked: "


def every_kernel(device: torch.device, early: bool | None = None) -> list[_C.Kernels]:
    """All sets of kernels that a device can run, for one adapter and for many.

    early: with PDL or without; None takes the current setting.
    """
    card = _C.cuda_card(device)
    early = _C.use_pdl() if early is None else early
    return [*_C.all_kernels(card, early), *_C.all_grouped_kernels(card)]


def check_kernels(
    device: torch.device | str | None = None,
    kernels: Sequence[_C.Kernels] | None = None,
    *,
    timeout_s: float | None = TIMEOUT_S,
    isolated: bool | None = None,
    begins: Callable[[str], object] = lambda name: None,
) -> dict[str, str]:
    """Compares kernels with the op in float64 now, instead of at their first use.

    Kernels with a known result are not checked again. The state of torch's random generators does
    not change.

    Args:
        device: a CUDA device; default: the current one.
        kernels: from ``_C.all_kernels`` or ``_C.kernels_of``; default: all that the card can run.
        timeout_s: how long each may take after its launch has returned; None: no limit, for example
            under compute-sanitizer.
        isolated: whether a child process checks them; default: on CUDA. If no child can be started,
            this process checks them.
        begins: called with a name before each check.

    Returns:
        The name of each that failed, now or before, and what failed; empty if all may be used. A
        result that begins with "could not be checked" is not remembered, so the check is repeated.

    Raises:
        RuntimeError: the build has no CUDA kernels, or there is no such device; or, if this process
            checks them, kernels have not ended in time or have left the device unusable.
    """
    need_kernels("kernels.kernel_checks")
    device = indexed(device)
    if kernels is None:
        kernels = every_kernel(device)
    unknown = [each for each in kernels if _C.check_result(device, each) == "not yet"]
    if isolated is None:
        isolated = device.type == "cuda" and bool(sys.executable)
    uncheckable = {}
    for each, result in _results(device, unknown, timeout_s, isolated, begins):
        if result.startswith(_UNKNOWN):
            uncheckable[each.name] = result
        else:
            _C.remember_check(device, each, result)
    failed = {each.name: _C.check_result(device, each) for each in kernels}
    known = {name: why for name, why in failed.items() if why not in ("passed", "not yet")}
    return known | uncheckable


def check_results(device: torch.device | str | None = None) -> dict[str, str]:
    """All kernels that have been checked on a device: name -> "passed" or what failed."""
    return dict(_C.check_results(indexed(device)))


def set_check_timeout(seconds: float | None) -> None:
    """Sets how long kernels may take in the check at their first use; None: no limit.

    The default is 10 s after their launch has returned. After that the call raises a RuntimeError:
    such kernels may never end, and until they do nothing else of the process can run on the device.

    Raises:
        RuntimeError: the build has no CUDA kernels.
        ValueError: not above 0.
    """
    need_kernels("kernels.set_check_timeout")
    if seconds is not None and not seconds > 0:
        raise ValueError(
            f"lora_ext.kernels.set_check_timeout: expected seconds > 0, but got {seconds}"
        )
    _C.set_check_timeout(math.inf if seconds is None else seconds)


Found = Iterator[tuple[_C.Kernels, str]]


def _results(
    device: torch.device,
    kernels: Sequence[_C.Kernels],
    timeout_s: float | None,
    isolated: bool,
    begins: Callable[[str], object],
) -> Found:
    if not isolated:
        yield from _results_here(device, kernels, timeout_s, begins)
        return
    left, lost = list(kernels), 0
    while left and lost < _MOST_LOST:
        request = {
            "device": str(device),
            "names": [each.name for each in left],
            "use_pdl": _C.use_pdl(),
            "timeout_s": timeout_s,
        }
        try:
            for _, result in answers(_CHILD, request, timeout_s, begins):
                yield left.pop(0), result
            lost += 1  # if kernels are left unchecked, the child had lost its device
        except ChildLost as error:
            lost += 1
            yield left.pop(0), str(error)
        except CannotStart:
            yield from _results_here(device, left, timeout_s, begins)
            return
    for each in left:
        yield each, f"{_UNKNOWN}{lost} processes that checked others were lost"


def _results_here(
    device: torch.device,
    kernels: Sequence[_C.Kernels],
    timeout_s: float | None,
    begins: Callable[[str], object],
) -> Found:
    before = _C.check_timeout()
    _C.set_check_timeout(math.inf if timeout_s is None else timeout_s)
    try:
        for each in kernels:
            begins(each.name)
            try:
                yield each, _C.check_kernels(device, each)
            except torch.OutOfMemoryError as error:
                yield each, f"{_UNKNOWN}{error}"
    finally:
        _C.set_check_timeout(before)


def serve() -> None:
    """The child's part of `isolated.answers`: reads a request, prints lines.

    It ends after kernels that have made its device unusable.
    """
    import warnings

    warnings.simplefilter("ignore")  # the parent warns
    request = json.load(sys.stdin)
    device = torch.device(request["device"])
    early = request["use_pdl"]
    _C.set_pdl(early)
    by_name = {each.name: each for each in every_kernel(device, early)}
    kernels = [by_name[name] for name in request["names"]]
    current = ""

    def say(what: str, name: str, result: str = "") -> None:
        print(json.dumps([what, name, result]), flush=True)

    def begins(name: str) -> None:
        nonlocal current
        current = name
        say("begin", name)

    try:
        for each, result in _results_here(device, kernels, request["timeout_s"], begins):
            say("end", each.name, result)
    except RuntimeError as error:
        known = _C.check_result(device, by_name[current])
        say("end", current, f"{_UNKNOWN}{error}" if known == "not yet" else known)
