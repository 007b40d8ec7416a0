"""Every class of experts that transformers decorates, against PEFT; docs/experts.md lists them."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from expert_helpers import assert_close, decorated_types, make_routes, mixture, run
from peft_helpers import accelerated, reasons

from lora_ext.versions import SUPPORTED

TYPES = decorated_types()
DOCS = Path(__file__).parents[2] / "docs" / "experts.md"
# Gates that compute in float32 whatever the experts' dtype is.
ROUNDED = {"beam", "inkling2", "inkling2_loop", "openai_privacy_filter"}


@pytest.mark.parametrize(("model", "kind"), TYPES, ids=[kind for _, kind in TYPES])
def test_each_type(model, kind):
    """Its eager forward on the same numbers, with gradients."""
    theirs = mixture((model, kind))
    ours, operands = accelerated(theirs), make_routes(9)
    assert {path for path, _ in reasons(ours)} == {
        "peft" if peft.__version__ == "0.19.0" else "fused"
    }
    tolerance = 1e-5 if model in ROUNDED else 1e-11
    assert_close(run(ours, *operands), run(theirs, *operands), tolerance)


def test_the_documentation_names_each_model():
    named = set(DOCS.read_text(encoding="utf-8").replace(",", " ").replace("|", " ").split())
    assert {model for model, _ in TYPES} - named == set()
    is_oldest = transformers.__version__.startswith(f"{SUPPORTED['transformers'][0]}.")
    assert len(TYPES) >= (25 if is_oldest else 60) and torch.get_default_dtype() == torch.float32
