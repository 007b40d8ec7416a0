"""Adapter folders whose files are missing, are no files or lie elsewhere; what a load opens."""

import copy
import os
import pickle
import shutil
import socket
import sys

import pytest
import torch
from adapter_helpers import (
    CONFIG,
    WEIGHTS,
    make_zoo,
    output,
    read_config,
    read_tensors,
    write_config,
)
from hostile_helpers import assert_refused

from lora_ext.adapters import AdapterError, load_adapter, read_adapter_config

pytestmark = pytest.mark.usefixtures("no_hang")

BIN = "adapter_model.bin"


def test_files_that_are_missing(folder, tmp_path):
    (folder / WEIGHTS).rename(folder / "elsewhere")
    assert_refused(folder, f"expected {WEIGHTS}, but the folder has none")
    (folder / BIN).write_bytes(pickle.dumps({}))
    assert_refused(folder, f"there is only {BIN}, a pickle, which is not read here")
    (folder / "elsewhere").rename(folder / WEIGHTS)
    load_adapter(make_zoo(torch.float32), folder)  # beside a pickle that is not looked at
    (folder / CONFIG).unlink()
    assert_refused(folder, f"expected {CONFIG}, but the folder has none")
    (folder / "pytorch_lora_weights.safetensors").touch()
    assert_refused(folder, "the folder is one of diffusers, .* pipe.load_lora_weights")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", f"expected {CONFIG}, but the folder has none")
    assert_refused(tmp_path / "none", f"a folder with {CONFIG} .*, but got nothing there")
    assert_refused(folder / WEIGHTS, "expected a folder .*, but got a file")
    assert_refused("a\0b", "but got nothing there")


def test_the_lines_that_convert_a_pickle(folder):
    base = make_zoo(torch.float32)
    wanted = output(load_adapter(copy.deepcopy(base), folder))
    tensors = read_tensors(folder)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / BIN)
    with pytest.raises(AdapterError) as caught:
        load_adapter(copy.deepcopy(base), folder)
    lines = [line[4:] for line in str(caught.value).splitlines() if line.startswith("    ")]
    exec("\n".join(lines), {})
    assert torch.equal(output(load_adapter(base, folder)), wanted)


def test_a_name_on_the_hub(folder):
    assert_refused("some-org/adapter_1.0", r"snapshot_download\('some-org/adapter_1.0'\) returns")


def test_a_file_of_another_case_is_not_taken(folder):
    (folder / WEIGHTS).rename(folder / WEIGHTS.capitalize())
    assert_refused(folder, f"expected {WEIGHTS}, but the folder has none")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["directory", "FIFO", "socket"])
def test_something_else_in_the_place_of_a_file(name, kind, folder, monkeypatch):
    (folder / name).unlink()
    monkeypatch.chdir(folder)  # the path of a socket is short
    if kind == "directory":
        (folder / name).mkdir()
    elif kind == "FIFO":
        os.mkfifo(folder / name)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    assert_refused(folder, f"{name}: expected a (regular|readable) file, but got")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["absolute", "relative", "chain", "loop", "dangling", "device"])
def test_links_out_of_the_folder(name, kind, folder, tmp_path):
    outside = tmp_path / "outside" / name
    outside.parent.mkdir()
    (folder / name).rename(outside)
    targets = {
        "absolute": outside,
        "relative": f"../outside/{name}",
        "chain": "inner",
        "loop": name,
        "dangling": "nowhere",
        "device": "/dev/zero",
    }
    if kind == "chain":
        (folder / "inner").symlink_to(outside)
    (folder / name).symlink_to(targets[kind])
    message = {
        "loop": "expected a readable file, but got Too many levels of symbolic links",
        "dangling": f"expected {name}, but the folder has none",
    }.get(kind, f"{name}: expected a file in the folder, but it is a link to ")
    assert_refused(folder, message)


def test_links_that_are_allowed(folder, tmp_path):
    """Inside the folder, to the folder, and those of the Hugging Face cache."""
    (folder / CONFIG).rename(folder / "real.json")
    (folder / CONFIG).symlink_to("real.json")
    (tmp_path / "link").symlink_to(folder)
    load_adapter(make_zoo(torch.float32), tmp_path / "link")

    cache = tmp_path / "models--some--adapter"
    for sub in ("", "sub"):
        snapshot = cache / "snapshots" / "0123abc" / sub
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir(exist_ok=True)
        for name, source in ((CONFIG, "real.json"), (WEIGHTS, WEIGHTS)):
            shutil.copy(folder / source, cache / "blobs" / f"blob-{name}")
            up = "../../../" if sub else "../../"
            (snapshot / name).symlink_to(f"{up}blobs/blob-{name}")
        load_adapter(make_zoo(torch.float32), snapshot)
    (cache / "blobs" / "deeper").mkdir()
    (cache / "blobs" / f"blob-{WEIGHTS}").rename(cache / "blobs" / "deeper" / "blob")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../../blobs/deeper/blob")
    assert_refused(snapshot, f"{WEIGHTS}: expected a file in the folder, but it is a link")


# ---- nothing is imported, opened or run ----

RECORDED: list | None = None


def record(event, arguments):
    if RECORDED is not None and event in (
        "open",
        "import",
        "exec",
        "subprocess.Popen",
        "os.system",
    ):
        RECORDED.append((event, arguments[0]))


sys.addaudithook(record)  # an audit hook cannot be removed: this one sleeps outside its test


def test_nothing_that_a_config_names_is_imported_or_opened(folder):
    """peft#3085, #2888: a config led to an import."""
    global RECORDED
    names = {
        "auto_mapping": {"base_model_class": "Popen", "parent_library": "antigravity"},
        "base_model_name_or_path": "../../../etc/passwd",
        "revision": "../../main",
        "peft_version": "../1",
        "corda_config": {"cache_file": "/etc/passwd", "covariance_file": "/dev/zero"},
        "runtime_config": {"ephemeral_gpu_offload": "__import__('os').abort()"},
    }
    write_config(folder, {**read_config(folder), **names})
    base = make_zoo(torch.float32)
    load_adapter(copy.deepcopy(base), folder)
    modules = set(sys.modules)
    RECORDED = []
    try:
        load_adapter(base, folder)
    finally:
        events, RECORDED = RECORDED, None
    assert sorted(events) == [("open", str(folder / CONFIG)), ("open", str(folder / WEIGHTS))]
    assert set(sys.modules) == modules
    assert read_adapter_config(folder).base_model_name_or_path == "../../../etc/passwd"
