"""A child process that answers, hangs, dies, or never begins."""

import time

import pytest

from lora_ext.kernels import isolated
from lora_ext.kernels.isolated import CannotStart, ChildLost, answers

SAYS = """
import json, os, sys, time
request = json.load(sys.stdin)
def say(*words): print(json.dumps(words), flush=True)
for name in request:
    say("begin", name, "")
    if name == "hangs": os.fork() or time.sleep(600); time.sleep(600)
    if name == "aborts": print("out of patience", file=sys.stderr, flush=True); os.abort()
    print("noise")
    say("end", name, name.upper())
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(isolated, "_HOST_S", 0.0)


def asked(*names, timeout_s=30.0):
    begun, got = [], []
    try:
        for answer in answers(SAYS, names, timeout_s, begun.append):
            got.append(answer)
    except RuntimeError as error:
        return begun, got, error
    return begun, got, None


def test_answers_come_in_order():
    assert asked("a", "b") == (["a", "b"], [("a", "A"), ("b", "B")], None)


def test_an_answer_that_never_comes_is_lost_with_all_that_the_child_started():
    begun, got, error = asked("a", "hangs", "b", timeout_s=3.0)
    assert begun == ["a", "hangs"] and got == [("a", "A")]
    assert isinstance(error, ChildLost) and "said nothing for 3 s" in str(error)


def test_a_child_that_dies_says_how():
    begun, got, error = asked("a", "aborts", "b")
    assert begun == ["a", "aborts"] and got == [("a", "A")]
    assert isinstance(error, ChildLost)
    assert str(error) == "the process that checked it ended with SIGABRT: out of patience"


@pytest.mark.parametrize("code", ["raise ImportError('no torch')", "import sys; sys.exit(3)"])
def test_a_child_that_never_begins_says_nothing_about_any(code):
    with pytest.raises(CannotStart, match=r"no torch|exit status 3"):
        list(answers(code, ["a"], 30.0))


def test_a_silent_child_cannot_start(monkeypatch):
    monkeypatch.setattr(isolated, "_START_S", 1.0)
    start = time.monotonic()
    with pytest.raises(CannotStart, match="said nothing for 1 s"):
        list(answers("import time; time.sleep(600)", ["a"], None))
    assert time.monotonic() - start < 300


def test_no_child_is_left_when_nobody_listens_any_more():
    conversation = answers(SAYS, ["a", "hangs"], None)
    next(conversation)
    conversation.close()
