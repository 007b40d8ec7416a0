"""A stranger's expressions, and configs with very many: nothing hangs, and most are never run."""

import pytest
import torch
from adapter_helpers import CONFIG, make_zoo, read_config, write_config
from hostile_helpers import assert_refused

from lora_ext.adapters import alphas, load_adapter
from lora_ext.models import lora_layers

pytestmark = pytest.mark.usefixtures("no_hang")

# With `re` any of these would take longer than the universe has existed.
CATASTROPHIC = [r"([a-z0-9._]+)+!", r"(\w|\.|\w)*!", "(.*)*!", "((a|.)*)*!"]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("expression", [*CATASTROPHIC, "(" * 1000, "[", "a" * 100_000])
def test_expressions_that_choose_layers_are_never_run(field, expression, folder):
    """The tensors say which layers have the adapter."""
    write_config(folder, {**read_config(folder), field: expression})
    model = load_adapter(make_zoo(torch.float32), folder)
    assert len(list(lora_layers(model))) == 3


def test_keys_of_rank_pattern_are_never_run(folder):
    """The shapes say which rank a layer has."""
    patterns = dict.fromkeys([*CATASTROPHIC, "(", r"(q)\1", *map(str, range(40_000))], 4)
    write_config(folder, {**read_config(folder), "rank_pattern": patterns})
    load_adapter(make_zoo(torch.float32), folder)


@pytest.mark.parametrize("expression", CATASTROPHIC)
def test_catastrophic_keys_of_alpha_pattern_end(expression, folder, monkeypatch):
    monkeypatch.setattr(alphas, "_SECONDS", 1.0)
    base = make_zoo(torch.float32)
    write_config(folder, {**read_config(folder), "alpha_pattern": {expression: 4}})
    try:
        load_adapter(base, folder)  # the library sees that some of them cannot match
    except ValueError as error:
        assert "alpha_pattern to be matched in 1 s" in str(error)


def test_an_alpha_pattern_that_takes_too_long_is_refused(folder, monkeypatch):
    monkeypatch.setattr(alphas, "_SECONDS", 0.0)
    write_config(folder, {**read_config(folder), "alpha_pattern": {r".*\.(mlp|none)": 4}})
    assert_refused(folder, r"alpha_pattern to be matched in 0 s.*; write the modules' names")


@pytest.mark.parametrize("pattern", ["(.|a|.)*{:05d}", "(a{{64}}){{60}}{:05d}"])
def test_very_many_patterns_end(pattern, folder, monkeypatch):
    """Within 1 MiB of config."""
    monkeypatch.setattr(alphas, "_SECONDS", 1.0)
    patterns = {pattern.format(number): 2 for number in range(40_000)}
    write_config(folder, {**read_config(folder), "alpha_pattern": patterns})
    assert (folder / CONFIG).stat().st_size < 1 << 20
    assert_refused(folder, "alpha_pattern to be matched in 1 s")


@pytest.mark.parametrize("key", ["(a+)+$(", "(?P<a>", "(?<=a*)b", "*"])
def test_a_key_that_is_no_expression(key, folder):
    write_config(folder, {**read_config(folder), "alpha_pattern": {key: 2}})
    try:
        load_adapter(make_zoo(torch.float32), folder)  # what `re` alone refuses
    except ValueError as error:
        assert "expected an expression in alpha_pattern" in str(error)
