"""Golden vectors: what each function of csrc/ptx/ returned for given operands; how to compare two.

A file is JSON, written by conformance.cu, the same bytes on each run of one machine:

    format, version   "lora_ext conformance vectors", 1
    producer          kind "gpu" or "emulator", name, compute_capability; a GPU's toolkit and driver
    seed              of the operands
    cases             name, functions executed, architecture (80 or 90), comparison, inputs, outputs

and an array of the inputs or outputs has name, type (u8, u16, u32, f32), shape, hash (64-bit FNV-1a
of its bytes) and data (base64, little-endian). Inputs in golden/ have no data.

Comparison "exact" is bit by bit. Comparison "product" is d = c + a b with 16-bit operands and fp32
sums. A tensor core adds in an order and with a rounding that are not documented. Each of K + 1
terms costs at most one unit in the last place of the largest intermediate, so that d is within
(K + 1) 2^-23 (|c| + sum |a| |b|) of the exact value, on a GPU and in the execution layer.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FORMAT, VERSION = "lora_ext conformance vectors", 1
DTYPES = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "f32": "<f4"}
EPSILON = 2.0**-23


class VectorsError(ValueError):
    """A file that is not what this module describes."""


@dataclass
class Array:
    type: str
    shape: tuple[int, ...]
    hash: str
    data: np.ndarray | None


@dataclass
class Case:
    functions: list[str]
    architecture: int
    comparison: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]


@dataclass
class Vectors:
    producer: dict
    cases: dict[str, Case]

    @property
    def functions(self) -> set[str]:
        return {name for case in self.cases.values() for name in case.functions}


def fnv1a(data: bytes) -> str:
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte) * 1099511628211 % 2**64
    return f"{value:016x}"


def read_array(entry: dict) -> Array:
    shape = tuple(entry["shape"])
    data = None
    if "data" in entry:
        dtype = np.dtype(DTYPES[entry["type"]])
        raw = base64.b64decode(entry["data"], validate=True)
        if len(raw) != dtype.itemsize * int(np.prod(shape)):
            raise VectorsError(f"array {entry['name']}: {len(raw)} bytes for shape {list(shape)}")
        data = np.frombuffer(raw, dtype).reshape(shape)
    return Array(entry["type"], shape, entry["hash"], data)


def read_case(entry: dict) -> Case:
    inputs, outputs = (
        {array["name"]: read_array(array) for array in entry[side]}
        for side in ("inputs", "outputs")
    )
    if entry["comparison"] not in ("exact", "product"):
        raise VectorsError(f"case {entry['name']}: unknown comparison {entry['comparison']!r}")
    return Case(entry["functions"], entry["architecture"], entry["comparison"], inputs, outputs)


def parse(text: str) -> Vectors:
    """Reads a file's text; raises VectorsError if it is damaged or of another version."""
    try:
        file = json.loads(text)
        found = (file["format"], file["version"])
        if found != (FORMAT, VERSION):
            raise VectorsError(f"expected {FORMAT!r} version {VERSION}, but got {found}")
        cases = {entry["name"]: read_case(entry) for entry in file["cases"]}
        if len(cases) != len(file["cases"]):
            raise VectorsError("two cases have the same name")
        return Vectors(file["producer"], cases)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, VectorsError):
            raise
        raise VectorsError(f"not a file of conformance vectors: {error!r}") from error


def load(path: Path) -> Vectors:
    try:
        return parse(path.read_text())
    except VectorsError as error:
        raise VectorsError(f"{path.name}: {error}") from error


# ---- products ----


def widen(bits: np.ndarray, name: str) -> np.ndarray:
    """16-bit operands as float64; the case's name says the format."""
    if "bf16" in name:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def reference(name: str, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The exact d of a product, and how far a tensor core's may be from it. Needs the inputs."""
    inputs = {key: array.data for key, array in case.inputs.items()}
    a = widen(inputs["a"], name)
    transposed = inputs.get("b_transposed")
    b = widen(inputs["b"], name) if transposed is None else widen(transposed, name).T
    c = inputs["c"].astype(np.float64)
    magnitude = np.abs(c) + np.abs(a) @ np.abs(b)
    return c + a @ b, (a.shape[1] + 1) * EPSILON * magnitude


def product_differences(name: str, case: Case, d: np.ndarray, whose: str) -> list[str]:
    exact, bound = reference(name, case)
    error = np.abs(d.astype(np.float64) - exact)
    wrong = np.argwhere(~(error <= bound))  # a NaN is wrong too
    if not len(wrong):
        return []
    at = tuple(int(i) for i in wrong[0])
    return [
        f"{name}: {whose} d{list(at)} is {d[at]}, expected {exact[at]} within {bound[at]:.3g}"
        f" ({len(wrong)} of {d.size} wrong)"
    ]


# ---- comparing two machines ----


def exact_differences(name: str, output: str, ours: np.ndarray, golden: np.ndarray) -> list[str]:
    wrong = np.argwhere(ours.view(f"u{ours.itemsize}") != golden.view(f"u{golden.itemsize}"))
    if not len(wrong):
        return []
    at = tuple(int(i) for i in wrong[0])
    return [
        f"{name}: {output}{list(at)} is {ours[at]}, on the GPU {golden[at]}"
        f" ({len(wrong)} of {ours.size} differ)"
    ]


def case_differences(name: str, ours: Case, golden: Case) -> list[str]:
    """What is different between the execution layer's case, which has its inputs, and a GPU's."""
    for side in ("inputs", "outputs"):
        of = [
            {key: (array.type, array.shape) for key, array in getattr(case, side).items()}
            for case in (ours, golden)
        ]
        if of[0] != of[1]:
            return [f"{name}: {side} are {of[0]}, on the GPU {of[1]}: write its file anew"]
    for key, array in golden.inputs.items():
        if array.hash != ours.inputs[key].hash:
            return [f"{name}: the operand {key} is another one on the GPU: write its file anew"]
    found = []
    for key, array in golden.outputs.items():
        if array.data is None or fnv1a(array.data.tobytes()) != array.hash:
            return [f"{name}: the output {key} does not have its hash: the file is damaged"]
        if ours.comparison == "exact":
            found += exact_differences(name, key, ours.outputs[key].data, array.data)
        else:
            found += product_differences(name, ours, array.data, "the GPU's")
    return found


def compare(ours: Vectors, golden: Vectors) -> list[str]:
    """All differences between the execution layer's vectors and a GPU's, [] if it conforms."""
    found = []
    for name, case in golden.cases.items():
        if name not in ours.cases:
            found.append(f"{name}: the execution layer has no such case: write the GPU's file anew")
        else:
            found += case_differences(name, ours.cases[name], case)
    # Only sm_90 has the instructions of sm_90a: other GPUs, newer ones too, run the cases of sm_80.
    architecture = 90 if golden.producer["compute_capability"] == 90 else 80
    needed = {name for name, case in ours.cases.items() if case.architecture <= architecture}
    found += [f"{name}: missing in the GPU's file" for name in sorted(needed - golden.cases.keys())]
    return found
