"""What PEFT, `load_adapter` and `accelerate` make of an adapter folder, beside each other."""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from adapter_folders import Folder, result
from adapter_helpers import from_peft

from lora_ext import accelerate, load_adapter
from lora_ext.adapters import AdapterError

WAYS = {
    "lora_ext.accelerate(peft.PeftModel.from_pretrained(model, folder))": "accelerate PEFT's",
    "save_file(tensors,": "convert",
    "peft.PeftModel.from_pretrained(model, folder)": "PEFT's own",
}
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}  # PiSSA and OLoRA round the base's weight in PEFT


@dataclass
class Verdict:
    """What became of one folder.

    Attributes:
        peft: "loads", or the type of PEFT's error.
        ours: "loads", or what the message tells to do: "accelerate PEFT's", "convert", "PEFT's own"
            for what is no LoRA; "refused" if it tells nothing.
        why: the reason of load_adapter's refusal, "" if it loads.
        differs: what is not as PEFT's, "" if nothing.
    """

    peft: str
    ours: str
    why: str = ""
    differs: str = ""


@torch.no_grad()
def judge(folder: Folder, path: Path) -> Verdict:
    """Saves the folder to `path` and loads it both ways."""
    base = folder.make_base()
    inputs = folder.inputs()
    folder.save(base, path)
    theirs, wanted, error = None, None, ""
    try:
        theirs = from_peft(base, path)
        wanted = result(theirs(*inputs))
    except Exception as caught:
        error = type(caught).__name__
    verdict = Verdict(peft=error or "loads", ours="loads")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load_adapter(copy.deepcopy(base), path)
        if wanted is not None and not torch.allclose(result(model(*inputs)), wanted, **TOLERANCE):
            verdict.differs = "load_adapter's result"
    except AdapterError as caught:
        message = str(caught)
        verdict.ours = next((way for text, way in WAYS.items() if text in message), "refused")
        verdict.why = reason(message, path)
        if wanted is not None and theirs is not None and verdict.ours == "accelerate PEFT's":
            got = result(accelerate(theirs)(*inputs))
            if not torch.allclose(got, wanted, rtol=1e-4, atol=1e-5):
                verdict.differs = "accelerate's result"
    return verdict


def reason(message: str, path: Path) -> str:
    """The part of a message that is short enough for a table."""
    text = message.partition(f"{path}: ")[2].partition(";")[0].replace("adapter_config.json: ", "")
    text = text.replace("adapter_model.safetensors: ", "").replace("|", "\\|")
    return text if len(text) <= 120 else f"{text[:117]}..."


TABLE = Path(__file__).parents[2] / "docs" / "adapter-folders.md"


def row(name: str, verdict: Verdict) -> str:
    """The folder's line of the table."""
    return f"| {name} | {verdict.peft} | {verdict.ours} | {verdict.why} |"
