"""Runs PEFT's own tests of quantised bases on the CPU, accelerated, and adds the count to the docs.

    python scripts/peft_suite_quantized.py             # writes docs/compatibility-suite.md's end
    python scripts/peft_suite_quantized.py --keep      # takes files that an earlier run recorded

All but one of PEFT's test files with quantised LoRA layers ask for a GPU, of which they need the
memory: the libraries have kernels for the CPU. They run here as a copy under build/, in which only
what picks the device is changed, `EDITS` below; a line with an assertion is never touched. The one
file that is for the CPU, too, test_quantization, has a table of methods without LoRA: it gets one.
As in scripts/peft_suite.py each file runs as it is and accelerated, and models are random and
small; of widths that blocks of 64 divide, since bitsandbytes misreads others on the CPU. A case
counts if it gives a quantised layer a LoRA adapter and passes as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import peft_suite

DOCUMENT = peft_suite.DOCUMENT
HEADING = "## Quantised bases"
FILES = ("test_common_gpu", "test_gpu_examples", "test_quantization", "test_torch_compile")
LIBRARIES = ("bitsandbytes", "torchao", "hqq", "transformers")
GPU_ONLY = r"not \(torch\.cuda\.is_available\(\) or is_xpu_available\(\)\)"
# Words of the names of cases that are of other methods, of dense bases, of several processes, or of
# what PEFT's library computes on CUDA alone.
OTHERS = (
    "adalora or adaption or autocast_dtype or frod or hira or hotswap or hra or ia3 or loftq or "
    "no_quantization or notebook or offload or p_tuning or prefix or pytorch_compile or randlora "
    "or road or same_adapter or tensorparallel or testautocast or trainer_compile or _pvera or "
    "_vera or backend_is_set"
)
LORA_CASES = """TEST_CASES[:] = [
    (__import__("peft").LoraConfig, {"target_modules": ["q_proj", "v_proj"], **more})
    for more in (
        {},
        {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1},
        {"use_rslora": True},
        {"use_dora": True},
    )
]


def _peft_id("""
# (file, pattern, replacement): what picks the device, and the table that has no LoRA.
EDITS = (
    ("test_*", r'"cuda"', '"cpu"'),
    ("test_*", r"\bdevice = 0\n", 'device = "cpu"\n'),
    ("test_*", r'device_map=(?:0|\{"": 0\})', 'device_map="cpu"'),
    # A CPU has autocast in bfloat16 alone.
    ("test_*", r"\bfp16=True", "bf16=True, use_cpu=True"),
    ("test_*", r"skipif\(\s*" + GPU_ONLY, "skipif(False"),
    ("test_gpu_examples", r'if device == "cpu":\n    pytest\.skip\(.*\)\n', ""),
    ("testing_utils", r'skipif\(torch_device == "cpu"', "skipif(False"),
    ("testing_utils", r"skipif\(not torch\.cuda\.is_available\(\)", "skipif(False"),
    # Of the same graphs, without minutes of a C++ compiler for each.
    (
        "test_torch_compile",
        r"torch\.compile\(model, ",
        'torch.compile(model, backend="aot_eager", ',
    ),
    ("test_quantization", r"def _peft_id\(", LORA_CASES),
)


def edited(name: str, text: str) -> str:
    """A file of PEFT's tests with the edits that are for it.

    Raises:
        ValueError: an edit changes a line with an assertion, or finds nothing to change.
    """
    new = text
    for pattern, old, replacement in EDITS:
        if re.fullmatch(pattern.replace("*", ".*"), name):
            new, count = re.subn(old, lambda _, to=replacement: to, new)
            if not count and pattern == name:
                raise ValueError(f"expected {old} in {name}.py of PEFT, but got a file without it")
    kept, found = ([s for s in t.splitlines() if "assert" in s] for t in (text, new))
    if kept != found:
        raise ValueError(f"expected edits of {name}.py that leave assertions, but they change one")
    return new


def on_cpu(release: Path) -> Path:
    """A copy of PEFT's tests that run on a CPU."""
    copy = release.with_name(f"{release.name}-on-cpu")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(release, copy)
    for path in sorted((copy / "tests").glob("*.py")):
        if path.stem in (*FILES, "testing_utils"):
            path.write_text(edited(path.stem, path.read_text()))
    return copy


def make_hub(home: Path) -> None:
    """The models that these files load, as scripts/peft_suite_hub.py makes them, and their data."""
    import datasets
    import peft_suite_hub as hub
    import torch

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    grouped = {**hub.GROUPED, **sizes}
    # Outputs large enough that an adapter changes them by more than the tests' tolerances.
    opt = {**hub.OPT, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "init_std": 0.1}
    gated = {"feed_forward_proj": "gated-gelu"}
    t5 = {**hub.T5, "d_model": 64, "d_kv": 16, "d_ff": 128}
    whisper = {**hub.WHISPER, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    gpt2 = {**hub.GPT2, "n_embd": 64}
    tiny = "peft-internal-testing/tiny-random-"
    models = {
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("LlamaForCausalLM", grouped),
        "bigscience/bloomz-560m": ("BloomForCausalLM", {**hub.BLOOM, "hidden_size": 64}),
        "facebook/opt-125m": ("OPTForCausalLM", opt),
        "facebook/opt-350m": ("OPTForCausalLM", opt),
        "facebook/opt-6.7b": ("OPTForCausalLM", opt),
        "google/flan-t5-base": ("T5ForConditionalGeneration", {**t5, **gated}),
        "gpt2": ("GPT2LMHeadModel", gpt2),
        "openai-community/gpt2": ("GPT2LMHeadModel", gpt2),
        "openai/whisper-large": ("WhisperForConditionalGeneration", whisper),
        "peft-internal-testing/opt-125m": ("OPTForCausalLM", {**opt, "num_hidden_layers": 12}),
        f"{tiny}BloomForCausalLM": ("BloomForCausalLM", {**hub.BLOOM, "hidden_size": 64}),
        f"{tiny}OPTForCausalLM": ("OPTForCausalLM", opt),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", grouped),
        f"{tiny}t5": ("T5ForConditionalGeneration", t5),
        "t5-small": ("T5ForConditionalGeneration", t5),
        "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", grouped),
    }
    for name, (kind, values) in models.items():
        torch.manual_seed(zlib.crc32(name.encode()))
        hub.MODELS[name] = hub.Model(kind, values)
        hub.make_model(home, name)
    adapter = "ybelkada/test-st-lora"
    hub.ADAPTERS[adapter] = hub.Adapter("AutoModelForCausalLM", "facebook/opt-350m", "CAUSAL_LM")
    hub.make_adapter(home, adapter)
    words = [f"{a}{b}" for a in ("to ", "not ", "or ") for b in ("be", "see", "do", "go")]
    quotes = [" ".join(words[(i * j) % 12] for j in range(1, 5 + i % 5)) for i in range(120)]
    rows = [{"quote": quote, "author": "nobody", "tags": ["a"]} for quote in quotes]
    data = datasets.Dataset.from_list(rows)
    for name in ("ybelkada/english_quotes_copy", "Abirate/english_quotes"):
        hub.write_data(home, name, "train", data.features, data)


WAYS = {
    "fused": "with a fused forward",
    "added": "the base called, the update added",
    "peft": "with PEFT's forward only",
    "none": "without a forward of an active adapter",
}


def path_of(entry: dict) -> str:
    """The best way in which a case ran a quantised layer that has active adapters."""
    paths = entry.get("quantized") or {}
    return next((name for name in WAYS if paths.get(name)), "none")


def sentence(total: Counter[str]) -> str:
    return (
        f"**{total['passed']} of {total['cases']} cases that pass on plain PEFT pass "
        f"accelerated**; a fused path ran in {total['fused']} of them."
    )


def report(with_kernels: peft_suite.Results, without: peft_suite.Results) -> str:
    """The section, from file -> (plain, accelerated), of a processor as it is and of one without
    AVX512_BF16."""
    first, second = (
        peft_suite.count(results, "quantized_lora", path_of) for results in (with_kernels, without)
    )
    failures = first.failures + second.failures
    left_out = ", ".join(f"{count} {outcome}" for outcome, count in first.left_out.most_common())
    parts = [
        HEADING,
        f"{', '.join(f'{name} {found(name)}' for name in LIBRARIES)}; written by `python "
        "scripts/peft_suite_quantized.py`. Of seven files of PEFT's that name a library that "
        "quantises, two give no quantised layer an adapter, and their cases are above "
        "(test_lora_ga, test_tuners_utils), and one needs a package and a GPU (test_gptqmodel). "
        "Three others ask "
        "for a GPU, too, and ran on the CPU, by edits of what picks the device (the request for a "
        "GPU, `cuda`, fp16 where a CPU has bfloat16, inductor) and of no line with an assertion. "
        "test_quantization, which has no LoRA, got four LoRA configurations in its table. Not run: "
        "HQQ, which transformers 5 does not load; LoftQ, which PEFT computes on CUDA; GPTQ, AWQ, "
        "AQLM and EETQ, which are not installed; several GPUs.",
        f"On a CPU {'with' if has_kernels() else 'without'} AVX512_BF16: {sentence(first.total)}",
        *first.table(WAYS),
        "On that CPU as on one without AVX512_BF16, where layers of 4 bits dequantise in eval mode "
        f"as in training: {sentence(second.total)}",
        *second.table(WAYS),
        "Cases that fail accelerated and pass as they are:" + (" none." if not failures else ""),
        *failures,
        f"Left out, since they do not pass on plain PEFT: {left_out or 'none'}.",
        *first.unable,
    ]
    return peft_suite.page(parts)


def has_kernels() -> bool:
    from bitsandbytes.functional import has_avx512bf16  # pyright: ignore[reportMissingImports]

    return has_avx512bf16()


def found(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def main() -> int:
    parser = peft_suite.parser_of(__doc__)
    parser.add_argument("--cases", default="", help="pytest's -k; prints")
    parser.add_argument("--make-hub", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_hub:
        make_hub(options.make_hub.resolve())
        return 0
    folder = options.folder.resolve()
    release = on_cpu(peft_suite.unpacked(folder))
    hub = peft_suite.made_hub(folder, options.keep, "hub-quantized", [__file__, "--make-hub"])
    os.environ["PEFT_DEBUG_WITH_TORCH_COMPILE"] = "1"
    more = ["-m", "single_gpu_tests or not multi_gpu_tests"]
    more += ["-k", options.cases or f"not ({OTHERS})"]
    records = folder / ("records-quantized-some" if options.cases else "records-quantized")
    both: tuple[peft_suite.Results, peft_suite.Results] = ({}, {})
    for name in FILES:
        if options.only not in name:
            continue
        print(name, file=sys.stderr, flush=True)
        counted: list[str] = []
        for results, folder_of, flags in (
            (both[0], records, []),
            (both[1], records.with_name(f"{records.name}-dequantised"), ["--no-avx512bf16"]),
        ):
            ways = []
            for is_plain in (True, False):
                arguments = (hub, options.keep, folder_of, [*more, *flags, *counted])
                ways.append(peft_suite.run(release, name, is_plain, *arguments))
                # What cannot count need not run again.
                counted = ["--counted", str(folder_of / f"{name}-plain.json")]
            results[name] = (ways[0], ways[1])
    text = report(*both)
    if options.only or options.cases:
        print(text)
    else:
        before = DOCUMENT.read_text().split(f"\n{HEADING}\n")[0]
        DOCUMENT.write_text(f"{before.rstrip()}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
