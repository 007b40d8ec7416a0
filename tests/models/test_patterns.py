r"""Patterns of module names in LoraConfig: names, globs and expressions."""

import fnmatch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ext import LoraConfig
from lora_ext.models.patterns import is_name_of, matches

TEXT = st.text(alphabet="ab.1-_d \n", max_size=8)
GLOB = st.text(alphabet="ab.*?[]!-\\^", max_size=7)


@pytest.mark.parametrize(
    ("pattern", "path", "wanted"),
    [
        ("q_proj", "layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "layers.0.xq_proj", False),
        ("attn.q_proj", "layers.0.attn.q_proj", True),
        ("attn.q_proj", "layers.0.crossattn.q_proj", False),
        ("a.b", "axb", False),
        ("*_proj", "layers.0.attn.q_proj", True),
        ("layers.?.q", "model.layers.7.q", True),
        ("layers.?.q", "model.layers.17.q", False),
        ("[qv]_proj", "x.v_proj", True),
        ("[!qv]_proj", "x.v_proj", False),
        (r"re:layers\.\d+\.mlp", "layers.12.mlp", True),
        (r"re:layers\.\d+\.mlp", "model.layers.12.mlp", False),
        (r"re:(?!.*visual).*\.(q|v)_proj", "text.layers.0.q_proj", True),
        (r"re:(?!.*visual).*\.(q|v)_proj", "visual.layers.0.q_proj", False),
        (r"re:(?i)MLP", "mlp", True),
    ],
)
def test_a_pattern(pattern, path, wanted):
    assert matches(pattern, path) is wanted


@settings(deadline=None, max_examples=500)
@given(glob=GLOB, path=TEXT)
def test_a_glob_is_that_of_fnmatch_on_the_path_or_its_end_at_a_dot(glob, path):
    ends = [path, *(path[i + 1 :] for i, char in enumerate(path) if char == ".")]
    if any(mark in glob for mark in "*?["):
        wanted = any(fnmatch.fnmatchcase(end, glob) for end in ends)
    else:
        wanted = glob in ends or is_name_of(glob, path)
    assert matches(glob, path) == wanted


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_an_expression_that_is_not_valid(field):
    with pytest.raises(ValueError, match=r"'re:\(a' has missing \)"):
        LoraConfig(**{"target_modules": "q", field: "re:(a"})
