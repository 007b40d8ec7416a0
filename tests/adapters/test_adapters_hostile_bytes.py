"""An adapter_model.safetensors whose bytes are damaged."""

import json
import pickle
import shutil

import pytest
import torch
from adapter_helpers import CONFIG, WEIGHTS, assert_unchanged, make_zoo, state_of
from hostile_helpers import A, B, assert_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_ext.adapters import AdapterError, load_adapter

pytestmark = pytest.mark.usefixtures("no_hang")


def split(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def edit_entry(key=A, **changes):
    def edit(data):
        header, rest = split(data)
        header[key] = {**header[key], **changes}
        return joined(header, rest)

    return edit


def edit_header(function):
    def edit(data):
        header, rest = split(data)
        return joined(function(header), rest)

    return edit


def same_offsets(header):
    header[A]["data_offsets"] = header[B]["data_offsets"]
    return header


def with_gap(data):
    header, rest = split(data)
    end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][1] == end:
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    return joined(header, rest + b"1234")


def without(field):
    def function(header):
        del header[A][field]
        return header

    return edit_header(function)


BAD_FILES = {
    "empty": lambda d: b"",
    "four bytes": lambda d: d[:4],
    "cut in the header": lambda d: d[:100],
    "cut in the data": lambda d: d[:-1],
    "appended": lambda d: d + b"x",
    "length of 2^63": lambda d: bytes(7) + b"\x80" + d[8:],
    "length of 2^64 - 1": lambda d: b"\xff" * 8 + d[8:],
    "length of 0": lambda d: bytes(8) + d[8:],
    "length 40 short": lambda d: (
        (int.from_bytes(d[:8], "little") - 40).to_bytes(8, "little") + d[8:]
    ),
    "not JSON": edit_header(lambda h: b"{this is no header}"),
    "a list": edit_header(lambda h: b"[1, 2]"),
    "not UTF-8": edit_header(lambda h: b'{"\xff": 1}'),
    "nesting": edit_header(lambda h: b'{"a":' * 50_000),
    "metadata": edit_header(lambda h: {**h, "__metadata__": {"a": 1}}),
    "entry of another kind": edit_header(lambda h: {**h, A: 3}),
    "no dtype": without("dtype"),
    "no shape": without("shape"),
    "unknown dtype": edit_entry(dtype="F7"),
    # onnxruntime and llama.cpp trusted such shapes and read beyond the data
    "a larger shape": edit_entry(shape=[4, 16]),
    "a huge shape": edit_entry(shape=[1 << 40, 1 << 40]),
    "an overflowing shape": edit_entry(shape=[1 << 32, 1 << 32, 2]),
    "a size of 2^70": edit_entry(shape=[1 << 70, 1]),
    "a negative size": edit_entry(shape=[-2, -16]),
    "half the dtype": edit_entry(dtype="F16"),
    "offsets exchanged": edit_entry(data_offsets=[128, 0]),
    "offsets beyond": edit_entry(data_offsets=[1 << 40, (1 << 40) + 128]),
    "negative offsets": edit_entry(data_offsets=[-128, 0]),
    "overlapping": edit_header(same_offsets),
    "gap": with_gap,
    "pickle": lambda d: pickle.dumps({"a": torch.ones(2)}),
    "zip": lambda d: b"PK\x03\x04" + bytes(400),
}


@pytest.mark.parametrize("edit", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_the_safetensors_library_refuses(edit, folder):
    path = folder / WEIGHTS
    path.write_bytes(edit(path.read_bytes()))
    assert_refused(folder, f"{WEIGHTS}: expected a whole safetensors file, but got: .*header")


CHANGED_ENTRIES = {
    "nine dimensions": (edit_entry(shape=[2, 16, *[1] * 7]), r"expected shape \[2, 16\]"),
    "another shape of the size": (edit_entry(shape=[16, 2]), r"expected shape \[2, 16\]"),
    "another dtype of the size": (edit_entry(dtype="I32"), "expected a floating dtype"),
}


@pytest.mark.parametrize(("edit", "message"), CHANGED_ENTRIES.values(), ids=CHANGED_ENTRIES.keys())
def test_a_valid_file_of_other_entries(edit, message, folder):
    path = folder / WEIGHTS
    path.write_bytes(edit(path.read_bytes()))
    assert_refused(folder, f"{WEIGHTS}: .*{message}")


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_damage_is_refused_or_harmless(data, pristine, tmp_path):
    """What loads after damage is a valid safetensors file of finite values."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = bytearray((pristine / WEIGHTS).read_bytes())
    header = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, min(len(content) - 1, header + 40)))
        content[where] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789"[]{},:'))
    shutil.copy(pristine / CONFIG, tmp_path / CONFIG)
    (tmp_path / WEIGHTS).write_bytes(content)
    model = nn.Module()
    model.layers = make_zoo(torch.float32).layers
    model.norm = nn.LayerNorm(10)
    before = state_of(model)
    try:
        load_adapter(model, tmp_path)
    except AdapterError:
        assert_unchanged(model, before)
        return
    try:
        tensors = load(bytes(content))
    except SafetensorError:
        pytest.fail("safetensors refuses what was loaded")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
