"""A save that is killed, fails or is watched: the folder holds the old adapter or the new one.

A step is one call of the operating system that changes a file: open, write, fsync, replace, unlink.
A kill before step n is a process that forks, runs n steps and is gone; where many are needed, every
step after the n-th raises, so that no clean-up of the program can run either.
"""

import os
import resource
import shutil
import signal
import threading
import time
from contextlib import contextmanager, suppress
from unittest import mock

import pytest
from adapter_helpers import CONFIG, WEIGHTS
from torch import nn

from lora_ext import LoraConfig, apply_lora
from lora_ext.adapters import AdapterError, save_adapter
from lora_ext.adapters import folder as adapter_folder
from lora_ext.adapters.folder import open_adapter, replace_adapter
from lora_ext.adapters.tensors import TensorFile

STEPS = ("open", "write", "fsync", "replace", "unlink")
CARD = b"card"

# Two adapters of other bytes in both files, and one that differs in the weights alone.
OLD = (b'{"old": 1}', b"old weights" * 50)
NEW = (b'{"new": 1}', b"new weights" * 70)
SAME_CONFIG = (OLD[0], b"other weights" * 60)


def put(folder, adapter):
    config, weights = adapter
    half = len(weights) // 2
    replace_adapter(str(folder), config, lambda: [weights[:half], weights[half:]], CARD)


def held(folder):
    """What a reader finds, None if there is no adapter."""
    try:
        with open_adapter(str(folder)) as files:
            return files.config, os.read(files.weights, 1 << 20)
    except AdapterError:
        return None


def names(folder):
    return {path.name for path in folder.iterdir()}


class Killed(BaseException):
    pass


def raise_killed():
    raise Killed


@contextmanager
def killed_before(step, halve_writes=True, kill=raise_killed):
    """Runs `step` steps; from then on nothing has an effect and everything kills."""
    taken = 0
    real = {name: getattr(os, name) for name in STEPS}
    real["fsync"] = lambda descriptor: None  # what a kill leaves does not depend on it

    def limited(name):
        def call(*args, **kwargs):
            nonlocal taken
            if name == "open" and not args[1] & os.O_CREAT:
                return real[name](*args, **kwargs)
            if taken == step and name == "write" and halve_writes and len(args[1]) > 1:
                taken += 1
                real[name](args[0], args[1][: len(args[1]) // 2])
                kill()
            if taken >= step:
                taken += 1
                kill()
            taken += 1
            return real[name](*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, limited(name))
        yield lambda: taken


def make_states(folder, start, adapter):
    """The folder after a kill before each step of saving `adapter` over `start`."""
    for step in range(10**6):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        if start is not None:
            put(folder, start)
        with killed_before(step) as taken:
            try:
                put(folder, adapter)
            except Killed:
                pass
            else:
                assert taken() == step
                return
        yield step


CASES = pytest.mark.parametrize(
    ("start", "adapter"),
    [(None, OLD), (OLD, NEW), (OLD, SAME_CONFIG), (OLD, OLD)],
    ids=["first", "both files", "weights alone", "the same"],
)


@CASES
def test_a_kill_before_any_step(start, adapter, tmp_path):
    folder = tmp_path / "adapter"
    found = []
    for _ in make_states(folder, start, adapter):
        state = held(folder)
        assert state in (start, adapter)
        found.append(state == adapter)
        # what lies around is no obstacle to the next save, and is gone after it
        put(folder, NEW)
        assert held(folder) == NEW
        assert names(folder) == {"notes.txt", CONFIG, WEIGHTS, "README.md"}
        assert (folder / "notes.txt").read_text() == "mine"
    if start != adapter:
        assert found == sorted(found)  # the old one until the commit, then the new one
        assert not found[0]
        assert found[-1]


@CASES
def test_two_kills(start, adapter, tmp_path):
    """The save after a killed one is killed before each of its steps too."""
    folder, copied = tmp_path / "adapter", tmp_path / "copied"
    third = (b'{"third": 1}', b"third")
    for _ in make_states(folder, start, adapter):
        before = held(folder)
        for other in (third, ((before or third)[0], b"fourth")):
            done = False
            for step in range(10**6):
                shutil.copytree(folder, copied)
                with killed_before(step, halve_writes=False), suppress(Killed):
                    put(copied, other)
                    done = True
                assert held(copied) in ((other,) if done else (before, other))
                put(copied, OLD)
                assert held(copied) == OLD
                shutil.rmtree(copied)
                if done:
                    break


def fork_and_kill(folder, adapter, step):
    """A child that is killed by SIGKILL before the step; True if it needed no more steps."""
    child = os.fork()
    if child == 0:
        try:
            with killed_before(step, kill=lambda: os.kill(os.getpid(), signal.SIGKILL)):
                put(folder, adapter)
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 7
        return True
    assert os.WTERMSIG(status) == signal.SIGKILL
    return False


@CASES
def test_sigkill(start, adapter, tmp_path):
    for step in range(10**6):
        folder = tmp_path / str(step)
        if start is not None:
            put(folder, start)
        done = fork_and_kill(folder, adapter, step)
        assert held(folder) in ((adapter,) if done else (start, adapter))
        put(folder, NEW)  # the lock of the dead process is free
        assert held(folder) == NEW
        if done:
            return


# ---- errors ----


@pytest.mark.parametrize("name", STEPS)
@CASES
def test_an_error_at_any_call_leaves_the_old_adapter_and_no_litter(
    start, adapter, name, tmp_path, monkeypatch
):
    """Disk full, at each place where it can be."""
    folder = tmp_path / "adapter"
    for count in range(10**6):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if start is not None:
            put(folder, start)
        before = names(folder)
        real, calls = getattr(os, name), 0

        def call(*args, real=real, count=count):
            nonlocal calls
            calls += 1
            if calls == count + 1:
                raise OSError(28, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, call)
            try:
                put(folder, adapter)
            except OSError as error:
                assert error.errno == 28
            else:
                break
        assert held(folder) in (start, adapter)
        if held(folder) == start != adapter:
            assert names(folder) == before
        put(folder, NEW)
        assert names(folder) == {CONFIG, WEIGHTS, "README.md"}


def test_a_file_that_may_not_grow(tmp_path):
    """The operating system's own error, at the limit on a file's size."""
    put(tmp_path, OLD)
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            put(tmp_path, (b"{}", b"x" * 5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert held(tmp_path) == OLD
    assert names(tmp_path) == before


def test_an_error_while_the_weights_are_made(tmp_path):
    put(tmp_path, OLD)

    def weights():
        yield b"some"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_adapter(str(tmp_path), b"{}", weights, CARD)
    assert held(tmp_path) == OLD
    assert names(tmp_path) == {CONFIG, WEIGHTS, "README.md"}


def test_an_interrupt_while_the_file_is_read_back(tmp_path, monkeypatch):
    """Torch's conversion of a storage raises a ValueError in its place, once."""
    model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoraConfig(["0"], r=2))
    save_adapter(model, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    model[0].lora_b.default.data.fill_(1)

    def opened(self, file):
        made(self, file)
        self._file = mock.Mock(wraps=file)
        self._file.get_tensor.side_effect = [
            ValueError("the shape of UntypedStorage"),
            mock.DEFAULT,
        ]

    made = TensorFile.__init__
    monkeypatch.setattr(TensorFile, "__init__", opened)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before


# ---- several at once ----


def test_a_second_save_at_the_same_time_is_refused(tmp_path):
    put(tmp_path, OLD)

    def weights():
        with pytest.raises(
            AdapterError, match="no other save to this folder now, but one is under way"
        ):
            put(tmp_path, SAME_CONFIG)
        yield b"new"

    replace_adapter(str(tmp_path), b"{}", weights, CARD)
    assert held(tmp_path) == (b"{}", b"new")
    put(tmp_path, OLD)  # the lock is free again


def test_a_file_that_a_save_has_moved_is_looked_for_again(tmp_path, monkeypatch):
    """Though the folder then looks as before, since the next save is as far."""
    put(tmp_path, OLD)
    opened, lost = adapter_folder._open_regular, iter([AdapterError("gone"), None, None])

    def open_later(*words):
        if error := next(lost):
            raise error
        return opened(*words)

    monkeypatch.setattr(adapter_folder, "_open_regular", open_later)
    assert held(tmp_path) == OLD


def test_readers_beside_a_writer(tmp_path):
    """Each reader finds a config and weights of one save."""
    put(tmp_path, OLD)
    stop = threading.Event()

    def write():
        for number in range(10**6):
            put(tmp_path, (b'{"n": %d}' % number, b"%d" % number))
            if stop.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        end = time.monotonic() + 1.5
        while time.monotonic() < end or len(seen) < 20:
            assert writer.is_alive()
            config, weights = held(tmp_path)
            assert (config, weights) == OLD or config == b'{"n": %s}' % weights
            seen.add(weights)
    finally:
        stop.set()
        writer.join()


# ---- what may be replaced ----


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, f"{WEIGHTS}.next", f"{CONFIG}.next"])
@pytest.mark.parametrize("kind", ["link out", "link in", "directory", "FIFO"])
def test_no_write_through_links_and_to_what_is_no_file(name, kind, tmp_path):
    folder = tmp_path / "adapter"
    put(folder, OLD)
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (folder / name).unlink(missing_ok=True)
    if kind == "directory":
        (folder / name).mkdir()
    elif kind == "FIFO":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(outside if kind == "link out" else "README.md")
    before = names(folder)
    message = f"{name}: expected a regular file to replace, but got a (link|directory|FIFO)"
    with pytest.raises(AdapterError, match=message):
        put(folder, NEW)
    assert outside.read_text() == "precious"
    assert names(folder) == before
    assert (folder / "README.md").read_bytes() == CARD


def test_a_link_to_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    put(tmp_path / "link", OLD)
    assert held(tmp_path / "real") == OLD


def test_files_get_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        put(tmp_path, OLD)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {CONFIG: 0o640, WEIGHTS: 0o640, "README.md": 0o640}
