"""Says in a wheel's name and metadata which torch its extension was compiled for.

    python scripts/tie_wheel.py lora_ext-0.1.0-cp311-cp311-linux_x86_64.whl FOLDER

An installation from source chooses the torch that is there, so pyproject.toml asks for any that is
recent enough. A wheel's choice has fallen: it becomes version 0.1.0+torch2.13.cu130, or .cpu
without CUDA kernels, and requires torch==2.13.*.
"""

import argparse
import base64
import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

FACTS = "lora_ext/_build.json"


def torch_release(facts: dict) -> str:
    """What an extension is tied to: 2.13 if torch 2.13.0+cpu compiled it."""
    return ".".join(facts["torch"].split("+")[0].split(".")[:2])


def local_label(facts: dict) -> str:
    """What follows the + of the version: the torch, and the CUDA toolkit of the kernels."""
    toolkit = f"cu{facts['cuda_version'].replace('.', '')}" if facts["cuda"] else "cpu"
    return f"torch{torch_release(facts)}.{toolkit}"


def tied_metadata(metadata: str, version: str, release: str) -> str:
    """METADATA with another version, and torch of one release alone."""
    for pattern, line in (
        (r"^Version: .*$", f"Version: {version}"),
        (r"^Requires-Dist: torch(?![\w.-]).*$", f"Requires-Dist: torch=={release}.*"),
    ):
        metadata, count = re.subn(pattern, line, metadata, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"METADATA: expected one line {pattern}, but got {count}")
    return metadata


def record_line(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


def tie(wheel: Path, folder: Path) -> Path:
    """Writes the tied wheel into the folder; returns its path."""
    name, version, tags = wheel.stem.split("-", 2)
    with zipfile.ZipFile(wheel) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    facts = next(json.loads(content) for info, content in entries if info.filename == FACTS)
    if "+" in version:
        raise ValueError(f"{wheel.name} is tied already: expected a version without a +")
    tied = f"{version}+{local_label(facts)}"
    old, new = f"{name}-{version}.dist-info/", f"{name}-{tied}.dist-info/"
    record = ""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{tied}-{tags}.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in entries:
            if info.filename.startswith(old):
                info.filename = new + info.filename.removeprefix(old)
            if info.filename == f"{new}RECORD":
                continue
            if info.filename == f"{new}METADATA":
                content = tied_metadata(content.decode(), tied, torch_release(facts)).encode()
            elif info.filename == FACTS:
                content = (json.dumps({**facts, "version": tied}, indent=2) + "\n").encode()
            record += record_line(info.filename, content)
            archive.writestr(info, content)
        archive.writestr(f"{new}RECORD", f"{record}{new}RECORD,,\n")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="as the build backend made it")
    parser.add_argument("folder", type=Path, help="where the tied wheel goes")
    arguments = parser.parse_args()
    print(tie(arguments.wheel, arguments.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
