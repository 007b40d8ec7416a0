"""Expressions of a config that would take ages, and very many of them: they end or are refused."""

import pytest
import torch
from adapter_helpers import CONFIG, make_zoo, read_config, write_config
from hostile_helpers import assert_refused

from lora_ext.adapters import AdapterError, load_adapter

pytestmark = pytest.mark.usefixtures("no_hang")


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern"])
def test_catastrophic_expressions_end(field, folder):
    """With `re` any of these would take longer than the universe has existed."""
    table = read_config(folder)
    expressions = [r"([a-z0-9._]+)+!", r"(\w|\.|\w)*!", "(.*)*!", "((a|.)*)*!"]
    if field == "target_modules":
        for expression in expressions:
            write_config(folder, {**table, "target_modules": expression})
            assert_refused(folder, "matches none")
    else:
        write_config(folder, {**table, "rank_pattern": dict.fromkeys(expressions, 4)})
        load_adapter(make_zoo(torch.float32), folder)


@pytest.mark.parametrize(
    "pattern",
    ["(.|a|.)*{:05d}", "(a{{64}}){{60}}{:05d}", "{:05d}(a|b)?"],
    ids=["slow", "large", "many"],
)
def test_very_many_patterns_end(pattern, folder):
    """Within 1 MiB of config; what would take minutes or gigabytes is refused."""
    patterns = {pattern.format(number): 2 for number in range(40_000)}
    write_config(folder, {**read_config(folder), "rank_pattern": patterns})
    assert (folder / CONFIG).stat().st_size < 1 << 20
    base = make_zoo(torch.float32)
    with pytest.raises(AdapterError, match="the patterns of the config to take at most"):
        load_adapter(base, folder)


def test_very_many_layers_with_a_rank_of_their_own(folder):
    """One look-up a layer for the keys that are written here, which name one path each."""
    patterns = {rf"^model\.layers\.{n}\.q_proj": 4 for n in range(20_000)}
    write_config(folder, {**read_config(folder), "rank_pattern": patterns})
    load_adapter(make_zoo(torch.float32), folder)
