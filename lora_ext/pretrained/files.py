"""What the headers of a model's files say about packed tensors, before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open


class Stored(NamedTuple):
    """A tensor's header: its file, shape, and dtype in safetensors' names."""

    file: str
    shape: tuple[int, ...]
    dtype: str


# (name, tensor, all tensors, the quantization_config) -> names its scales may have, their shape.
Rule = Callable[[str, Stored, Any], tuple[list[str], tuple[int, ...]] | str | None]


def headers(files: Iterable[str]) -> dict[str, Stored]:
    """The headers of safetensors files, by the names of tensors; other files are passed over.

    Raises:
        ValueError: a file is cut off, or no such file.
    """
    found: dict[str, Stored] = {}
    for path in map(Path, files):
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dictionary)
                    part = opened.get_slice(name)
                    found[name] = Stored(str(path), tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(
                f"lora_ext: expected whole tensors in {str(path)!r}, but it is cut off or no "
                f"safetensors file ({error}); copy or download it again"
            ) from error
    return found


def check_scales(stored: Mapping[str, Stored], rule: Rule, config: Any) -> None:
    """Raises ValueError, with tensor and file, for codes without scales or with others than the
    rule says."""
    for name, codes in stored.items():
        wanted = rule(name, codes, config)
        if wanted is None:
            continue
        if isinstance(wanted, str):
            raise ValueError(
                f"lora_ext: expected {wanted}, but {name!r} in {codes.file!r} is of "
                f"{list(codes.shape)} in {codes.dtype}"
            )
        names, shape = wanted
        scales = next((stored[each] for each in names if each in stored), None)
        if scales is None:
            raise ValueError(
                f"lora_ext: expected the scales {names[0]!r} of {name!r} in {codes.file!r}, but no "
                "file has them; copy or download the folder again"
            )
        if scales.shape != shape and math.prod(scales.shape) != math.prod(shape):
            raise ValueError(
                f"lora_ext: expected scales of {list(shape)} for {name!r} of {list(codes.shape)}, "
                f"but {names[0]!r} in {scales.file!r} is of {list(scales.shape)}"
            )


def mxfp4(name: str, codes: Stored, config: Any) -> tuple[list[str], tuple[int, ...]] | str | None:
    """``X_blocks [..., in / 32, 16]`` with ``X_scales [..., in / 32]``."""
    if not name.endswith("_blocks"):
        return None
    if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[-1] != 16:
        return "codes [E, out, in / 32, 16] in U8"
    return [name.removesuffix("_blocks") + "_scales"], codes.shape[:-1]


def fp8(name: str, codes: Stored, config: Any) -> tuple[list[str], tuple[int, ...]] | None:
    """``X`` in e4m3 with ``X_scale_inv`` for blocks of `weight_block_size`, or in two e2m1 a byte
    with one for 32 of a row; the scales' other names are those that transformers renames."""
    if len(codes.shape) < 2 or codes.dtype not in ("F8_E4M3", "I8"):
        return None
    stem = name.removesuffix(".weight")
    names = [f"{name}_scale_inv", f"{stem}.scale", f"{stem}.qscale_weight"]
    *lead, rows, columns = codes.shape
    down, across = config.weight_block_size or (rows, columns)
    if codes.dtype == "I8":
        down, across = 1, 16
    return names, (*lead, math.ceil(rows / down), math.ceil(columns / across))


def four_bits(name: str, codes: Stored, config: Any) -> tuple[list[str], tuple[int, ...]] | None:
    """bitsandbytes' ``X [in out / 2, 1]`` with ``X.absmax``, one for each block of 64."""
    if codes.dtype != "U8" or len(codes.shape) != 2 or codes.shape[1] != 1:
        return None
    return [f"{name}.absmax"], (-(-codes.shape[0] // 32),)
