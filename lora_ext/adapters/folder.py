r"""Reads the two files of an adapter as a consistent pair, and replaces them atomically.

    adapter_config.json           adapter_model.safetensors
    adapter_config.json.next      adapter_model.safetensors.next      while a save is under way

A save makes each step durable before the next:

    1  writes config.next, then weights.next      no effect yet
    2  config.next -> config                      the commit: weights.next without config.next
    3  weights.next -> weights

A reader that finds weights.next without config.next reads the weights from it, and the next save
does step 3 first. If the process is killed at any moment, `open_adapter` finds the old adapter or
the new one. If config.next exists, weights.next is removed first, so that no step of the cleanup
can look like a commit. A reader that runs during a save retries until the pair did not change while
it was opened.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from .errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
MAX_CONFIG_BYTES = 1 << 20
_PICKLE = "adapter_model.bin"
_DIFFUSERS = "pytorch_lora_weights.safetensors"
_NEXT = ".next"
NEW_WEIGHTS = WEIGHTS + _NEXT
_NEW_CONFIG = CONFIG + _NEXT
_NEW_CARD = "adapter_card.next"
_ATTEMPTS = 100
_KINDS = {"d": "a directory", "l": "a link", "p": "a FIFO", "s": "a socket"}


class OpenAdapter(NamedTuple):
    """The files of one adapter, a consistent pair: the bytes of adapter_config.json; a descriptor
    of the safetensors file, open for reading; that file's name in the folder."""

    config: bytes
    weights: int
    weights_name: str


@contextmanager
def open_adapter(folder: str) -> Iterator[OpenAdapter]:
    """Opens the pair of files of an adapter.

    Raises:
        AdapterError: a file is missing, no regular file, a link that leaves the folder (the Hugging
            Face cache's links to its blobs are allowed), or a config of more than 1 MiB.
    """
    if not os.path.isdir(folder):
        raise AdapterError(
            f"expected a folder with {CONFIG} and {WEIGHTS}, but got {_what_is_there(folder)}"
        )
    wrong = AdapterError(
        "expected files that stay the same while they are read, but they changed in each attempt"
    )
    for _ in range(_ATTEMPTS):
        with ExitStack() as stack:
            name = _weights_name(folder)
            opened: dict[str, int] = {}
            try:
                for part in (CONFIG, name):
                    opened[part] = _open_regular(folder, part)
                    stack.callback(os.close, opened[part])
            except AdapterError as error:
                wrong = error  # or a save has moved a file, even if the next one is as far again
                continue
            # The name first: from a commit on it differs, until the weights, too, are replaced.
            if _weights_name(folder) == name and all(_is_same(folder, *o) for o in opened.items()):
                yield OpenAdapter(_read_config(opened[CONFIG]), opened[name], name)
                return
    raise wrong


def _weights_name(folder: str) -> str:
    """The name of the file with the weights that belong to the config."""
    weights, config = (os.path.lexists(f"{folder}/{name}") for name in (NEW_WEIGHTS, _NEW_CONFIG))
    return NEW_WEIGHTS if weights and not config else WEIGHTS


def _what_is_there(path: str) -> str:
    if os.path.exists(path):
        return "a file"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return (
            "nothing there; if it is a name on the Hugging Face hub, give the folder that "
            f"huggingface_hub.snapshot_download({path!r}) returns"
        )
    return "nothing there"


def _open_regular(folder: str, name: str) -> int:
    path = os.path.join(folder, name)
    try:
        if stat.S_ISLNK(os.lstat(path).st_mode):
            path = _resolved_link(folder, name)
        # A FIFO instead of a file would block open() until a process writes to it.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise AdapterError(_missing(folder, name)) from None
    except OSError as error:
        raise AdapterError(f"{name}: expected a readable file, but got {error.strerror}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise AdapterError(f"{name}: expected a regular file, but got {_kind(mode)}")
    return descriptor


def _resolved_link(folder: str, name: str) -> str:
    """The target of a link, if it is inside the folder or among the blobs of its cache."""
    target = os.path.realpath(os.path.join(folder, name), strict=True)
    home = os.path.realpath(folder)
    parts = home.split(os.sep)
    # models--<owner>--<name>/snapshots/<revision>/... links to models--<owner>--<name>/blobs/<hash>
    caches = [os.sep.join(parts[:i]) for i, part in enumerate(parts[:-1]) if part == "snapshots"]
    inside = target.startswith(home + os.sep)
    if not inside and os.path.dirname(target) not in [os.path.join(c, "blobs") for c in caches]:
        raise AdapterError(
            f"{name}: expected a file in the folder, but it is a link to {target!r}; copy the file"
        )
    return target


def _is_same(folder: str, name: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(os.path.join(folder, name)), os.fstat(descriptor))
    except OSError:
        return False


def _read_config(descriptor: int) -> bytes:
    data = b""
    while len(data) <= MAX_CONFIG_BYTES and (chunk := os.read(descriptor, MAX_CONFIG_BYTES + 1)):
        data += chunk
    if len(data) > MAX_CONFIG_BYTES:
        size = max(len(data), os.fstat(descriptor).st_size)
        raise AdapterError(
            f"{CONFIG}: expected at most {MAX_CONFIG_BYTES} bytes, but it has {size}"
        )
    return data


def _missing(folder: str, name: str) -> str:
    pickle = os.path.join(folder, _PICKLE)
    if name == WEIGHTS and os.path.lexists(pickle):
        return (
            f"expected {WEIGHTS}, but there is only {_PICKLE}, a pickle, which is not read here; "
            "convert it with\n"
            "    import torch\n"
            "    from safetensors.torch import save_file\n"
            f"    tensors = torch.load({pickle!r}, map_location='cpu', weights_only=True)\n"
            "    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}\n"
            f"    save_file(tensors, {os.path.join(folder, WEIGHTS)!r})"
        )
    if os.path.lexists(os.path.join(folder, _DIFFUSERS)):
        return (
            f"expected {name}, but the folder is one of diffusers, with {_DIFFUSERS}; "
            "pipe.load_lora_weights(folder) reads it, then lora_ext.accelerate(pipe.transformer), "
            "or pipe.unet, runs it"
        )
    return f"expected {name}, but the folder has none; an adapter is {CONFIG} and {WEIGHTS}"


def _kind(mode: int) -> str:
    return _KINDS.get(stat.filemode(mode)[0], "a device")


# ---- writing ----


def replace_adapter(
    folder: str, config: bytes, weights: Callable[[], Iterable[memoryview | bytes]], card: bytes
) -> None:
    """Replaces the adapter in the folder or, on an error, leaves the folder unchanged.

    Other files in the folder are not touched; README.md is written if there is none. `weights`
    yields the parts of the safetensors file; each is in NEW_WEIGHTS when it goes on, and what it
    raises leaves the folder unchanged.

    Raises:
        AdapterError: another process is saving there, or one of the files is a link or no regular
            file.
        OSError: the disk is full, or the folder cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise AdapterError(
            "expected a folder, or nothing at this path yet, but there is a file"
        ) from None
    for name in (WEIGHTS, CONFIG, NEW_WEIGHTS, _NEW_CONFIG, _NEW_CARD):
        path = os.path.join(folder, name)
        if os.path.lexists(path) and not stat.S_ISREG(mode := os.lstat(path).st_mode):
            raise AdapterError(
                f"{name}: expected a regular file to replace, but got {_kind(mode)}; remove it or "
                "save to another folder"
            )
    with _locked(folder) as directory:
        save = _Save(folder, directory)
        save.recover()
        try:
            # Everything that needs disk space happens before the first rename.
            save.write(_NEW_CONFIG, [config])
            save.write(NEW_WEIGHTS, weights())
            if not save.exists(CARD):
                save.write(_NEW_CARD, [card])
            save.rename(_NEW_CONFIG, CONFIG)  # the commit
            save.rename(NEW_WEIGHTS, WEIGHTS)
            if save.exists(_NEW_CARD):
                save.rename(_NEW_CARD, CARD)
        except BaseException:
            with suppress(OSError):
                save.recover()
            raise


@contextmanager
def _locked(folder: str) -> Iterator[int]:
    """The folder's descriptor, locked against other saves; a kill frees the lock."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AdapterError(
                "expected no other save to this folder now, but one is under way; save from one "
                "process, or to another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield directory
    finally:
        # A forked child may hold a copy of the descriptor, which close() alone would leave locked.
        with suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_UN)
        os.close(directory)


class _Save:
    """The steps of a save, each made durable, under the folder's lock."""

    def __init__(self, folder: str, directory: int) -> None:
        self.folder = folder
        self.directory = directory

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.path(name))

    def recover(self) -> None:
        """Finishes a save that was committed, or discards what one has left."""
        if _weights_name(self.folder) == NEW_WEIGHTS:
            self.rename(NEW_WEIGHTS, WEIGHTS)
        for name in (NEW_WEIGHTS, _NEW_CONFIG, _NEW_CARD):
            if self.exists(name):
                os.unlink(self.path(name))
                os.fsync(self.directory)

    def write(self, name: str, pieces: Iterable[memoryview | bytes]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path(name), flags, 0o666)
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(descriptor, rest[: 1 << 26]) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.fsync(self.directory)

    def rename(self, source: str, target: str) -> None:
        os.replace(self.path(source), self.path(target))
        os.fsync(self.directory)
