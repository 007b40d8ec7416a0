r"""Patterns of module names: the same answers as `re` and `fnmatch`, in linear time."""

import fnmatch
import re
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_ext.patterns import PeftTable, full_match, matches, peft_pattern
from lora_ext.patterns.automaton import MAX_STATES, Automaton, Budget
from lora_ext.patterns.regex_syntax import parse

TEXT = st.text(alphabet="ab.1-_d \n", max_size=8)


# ---- regular expressions ----

LITERAL = ["a", "b", "1", "-", "]", "}", r"\.", r"\-", r"\n"]
CLASS = [".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "[ab]", "[^a.]", "[a-c1]"]
CLASS += [r"[\d.-]", "[]a]", "[^]]"]
ASSERTION = ["^", "$", r"\b", r"\A", r"\Z"]
ATOM = st.sampled_from([*LITERAL, *CLASS, *ASSERTION])
QUANTIFIER = st.sampled_from(
    ["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{1,}", "{0}", "{2,3}?"]
)


def combined(children):
    quantified = st.tuples(children, QUANTIFIER)
    return st.one_of(
        st.lists(children, min_size=1, max_size=4).map("".join),
        st.lists(children, min_size=1, max_size=3).map(lambda items: f"({'|'.join(items)})"),
        quantified.map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


EXPRESSION = st.recursive(st.tuples(ATOM, QUANTIFIER).map("".join), combined, max_leaves=8)


def compiled(expression):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "possible nested set"
        return re.compile(expression)


@settings(deadline=None, max_examples=700)
@given(expression=EXPRESSION, texts=st.lists(TEXT, min_size=4, max_size=4))
@example(expression="(a|ab)(b|)", texts=["ab", "abb", "a", "b"])
@example(expression="(?:(?:a*)*)*b", texts=["aab", "", "b", "a"])
@example(expression=r"(?:^a|b$)+", texts=["a", "ab", "ba", "bb"])
@example(expression=r"\ba\b.*", texts=["a", "a.", "aa", "a b"])
def test_as_re_says(expression, texts):
    try:
        full_match(expression, "")
    except ValueError:  # a repeated assertion, as in re
        return
    pattern = compiled(expression)
    peft = compiled(rf"(.*\.)?({expression})$")
    for text in texts:
        if "\n" in text and re.search(r"\$|\\Z", expression):
            continue  # re's $ also matches before a last newline
        assert full_match(expression, text) == (pattern.fullmatch(text) is not None)
        if "\n" not in text:
            assert peft_pattern(expression, text) == (peft.match(text) is not None)


@settings(deadline=None, max_examples=700)
@given(expression=st.text(alphabet="ab.\\*+?|()[]^$-{}1,dPb=<!#:>", max_size=9))
def test_what_is_accepted_is_valid_for_re(expression):
    try:
        parse(expression)
    except ValueError:
        return
    compiled(expression)


@pytest.mark.parametrize(
    ("expression", "construct"),
    [
        (r"(a)\1", "a backreference at 5"),
        (r"\0", "a backreference"),
        ("(?=a)a", "a lookahead"),
        ("(?!a)a", "a lookahead"),
        ("(?<=a)a", "a lookbehind"),
        ("(?<!a)a", "a lookbehind"),
        ("(?i)a", "a flag"),
        ("(?i:a)", "a flag"),
        ("(?P<n>a)", "a named group"),
        ("(?P=n)", "a backreference"),
        ("(?#a)", "a comment"),
        ("(?>a)", "a atomic group"),
        ("(a)(?(1)b|c)", "a conditional group"),
        ("a++", "a possessive quantifier"),
        ("a**", "a multiple repeat"),
        ("a{2}{3}", "a multiple repeat"),
        ("*a", "with nothing to repeat"),
        ("^*", "a repeated assertion"),
        ("(a", "a group that is not closed"),
        ("a)", r"an unbalanced '\)'"),
        ("[a", "a class that is not closed"),
        ("[b-a]", "a range that is not valid"),
        (r"[\d-a]", "a range that is not valid"),
        ("a{65}", "a repetition of more than 64"),
        ("a{0,0000000000000000065}", "a repetition of more than 64"),
        ("a{3,2}", "bounds are exchanged"),
        ("a{b}", "a brace that is no repetition"),
        ("a{1,2", "a brace that is no repetition"),
        ("a\\", "a backslash with nothing after it"),
        (r"\q", r"the escape \\q"),
        (r"\Ba", r"the escape \\B"),
        (r"\x41", r"the escape \\x"),
        ("(" * 65 + ")" * 65, "more than 64 groups inside each other"),
        ("((a{64}){64}){64}", f"more than {MAX_STATES} states"),
        ("((((a{1,9}){9}){9}){9}){9}", f"more than {MAX_STATES} states"),
    ],
)
def test_what_is_not_of_the_subset_is_named(expression, construct):
    for function in (full_match, peft_pattern):
        with pytest.raises(ValueError, match=construct):
            function(expression, "a")
    with pytest.raises(ValueError, match=construct):
        matches(f"re:{expression}", "a")


def test_sixty_four_groups_inside_each_other():
    assert full_match("(" * 64 + "a" + ")" * 64, "a")


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+$",
        "(a|a)*b",
        "(.*)*x",
        "(a|aa)+b",
        "(a*)*b",
        "(.*a){30}b",
        "(a?){64}a{64}",
        "(?:(?:a+)+)+b",
        r"(\w+\.?)+!",
        "([a-z]+)*=",
    ],
)
def test_no_expression_is_catastrophic(expression):
    """`re` would need 2^1000 steps for most of these."""
    automaton = Automaton(parse(expression))
    budget = Budget("a test", 10**9)
    text = "a" * 1000
    assert automaton.accepts(text, budget) == (expression == "(a+)+$")
    assert budget.spent <= (len(text) + 1) * (len(automaton) + 1)
    before = budget.spent
    automaton.accepts(text, budget)  # each set of states and character is known
    assert budget.spent - before <= len(text) + len(automaton)


@settings(deadline=None, max_examples=200)
@given(expression=EXPRESSION, text=st.text(alphabet="ab.1-", max_size=60))
def test_steps_are_bounded_by_length_times_states(expression, text):
    try:
        automaton = Automaton(parse(expression))
    except ValueError:
        return
    budget = Budget("a test", 10**9)
    automaton.accepts(text, budget)
    assert budget.spent <= (len(text) + 1) * (len(automaton) + 1)


def test_what_is_remembered_is_bounded(monkeypatch):
    """After forgetting, the answers are the same."""
    monkeypatch.setattr("lora_ext.patterns.automaton._MAX_REMEMBERED", 20)
    automaton = Automaton(parse("(a|b)*a(a|b){6}"))
    pattern = re.compile("(a|b)*a(a|b){6}")
    for number in range(512):
        text = f"{number:09b}".replace("0", "a").replace("1", "b")
        wanted = pattern.fullmatch(text) is not None
        assert automaton.accepts(text, Budget("a test", 10**6)) == wanted
        assert len(automaton._steps) <= 20


def test_a_budget_is_for_all_matches_together():
    budget = Budget("the test's patterns", 100)
    assert matches("re:a*", "a" * 40, budget)
    with pytest.raises(ValueError, match="expected the test's patterns to take at most 100 steps"):
        matches("re:(a|b)*", "a" * 90, budget)


# ---- names and globs ----


@pytest.mark.parametrize(
    ("pattern", "path", "wanted"),
    [
        ("q_proj", "q_proj", True),
        ("q_proj", "layers.0.q_proj", True),
        ("0.q_proj", "layers.0.q_proj", True),
        ("0.q_proj", "layers.10.q_proj", False),
        ("q_proj", "layers.0.xq_proj", False),
        ("q_proj", "q_proj.x", False),
        ("q.proj", "q_proj", False),
        ("*_proj", "layers.0.q_proj", True),
        ("layers.*", "model.layers.0.q_proj", True),
        ("layers.?.q", "layers.10.q", False),
        ("layers.[0-3].q", "m.layers.2.q", True),
        ("layers.[!0-3].q", "m.layers.2.q", False),
        ("[", "a.[", True),
        ("re:.*q_proj", "layers.0.q_proj", True),
        ("re:q_proj", "layers.0.q_proj", False),
        ("re:", "", True),
        ("", "", True),
    ],
)
def test_names_and_globs(pattern, path, wanted):
    assert matches(pattern, path) is wanted


@settings(deadline=None, max_examples=700)
@given(
    glob=st.text(alphabet="ab.*?[]!-c\\^", max_size=8),
    path=st.text(alphabet="abc.-[]!^\\", max_size=8),
)
@example(glob="[]-a]*", path="]")
@example(glob="[--a]", path="-")
@example(glob="[c-a]", path="b")
@example(glob="[!c-a]", path="b")
def test_globs_as_fnmatch_says(glob, path):
    if not any(mark in glob for mark in "*?["):
        wanted = path == glob or path.endswith(f".{glob}")
    else:
        parts = path.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts))]
        wanted = any(fnmatch.fnmatchcase(end, glob) for end in ends)
    assert matches(glob, path) == wanted


@pytest.mark.parametrize(
    ("key", "path", "wanted"),
    [
        ("q_proj", "layers.0.q_proj", True),
        ("layers.0.q_proj", "layers.0.q_proj", True),
        ("layers.0.q_proj", "model.layers.0.q_proj", True),
        ("layers.0.q_proj", "layersX0.q_proj", True),  # a dot is any character
        (r"layers\.0\.q_proj", "layersX0.q_proj", False),
        ("^layers.0.q_proj", "model.layers.0.q_proj", False),
        (r"^layers\.0\.q_proj$", "layers.0.q_proj", True),
        ("proj", "q_proj", False),
        (r".*\.[02]\.q_proj", "model.layers.2.q_proj", True),
        ("q|k", "a.k", True),
        ("", "a", False),
    ],
)
def test_keys_of_rank_pattern(key, path, wanted):
    assert peft_pattern(key, path) is wanted
    assert (re.match(rf"(.*\.)?({key})$", path) is not None) is wanted


def test_a_key_of_one_length_takes_one_step():
    """Configs with a rank for each layer have hundreds of such keys."""
    budget = Budget("a test", 10)
    assert peft_pattern(r"^model\.layers\.0\.q_proj", "model.layers.0.q_proj", budget)
    assert not peft_pattern("layers.1.q_proj", "model.layers.0.q_proj", budget)
    assert budget.spent == 2


@settings(deadline=None, max_examples=500)
@given(
    keys=st.lists(
        st.sampled_from(
            ["a", "b.a", r"b\.a", "^a", r"^b\.a", "^b.a", r"^b\.a$", "[ab]", "^[ab]", ".*", "b.*|a"]
        ),
        max_size=6,
        unique=True,
    ),
    path=st.sampled_from(["a", "b", "b.a", "a.b.a", "bxa", "c"]),
)
def test_the_first_key_that_matches_wins(keys, path):
    table = PeftTable({key: number for number, key in enumerate(keys)}, Budget("a test", 10**6))
    wanted = (n for n, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", path))
    assert table.get(path, -1) == next(wanted, -1)


# ---- sizes ----


def test_lengths_are_bounded():
    assert matches("a" * 1024, "a" * 1024)
    with pytest.raises(ValueError, match="a pattern of at most 1024 characters, but got 1025"):
        matches("a" * 1025, "a")
    with pytest.raises(ValueError, match="a pattern of at most 1024 characters"):
        peft_pattern("a" * 1025, "a")
    for pattern in ("re:a", "a*"):
        with pytest.raises(ValueError, match="a module path of at most 1024 characters"):
            matches(pattern, "a" * 1025)


@pytest.mark.parametrize("pattern", [None, 3, b"a"])
def test_a_pattern_is_a_string(pattern):
    with pytest.raises(ValueError, match="a pattern to be a string"):
        matches(pattern, "a")
