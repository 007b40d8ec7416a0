"""The documentation: links lead somewhere, code compiles, guides run, the site builds."""

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

import pytest
import torch
from peft_helpers import tiny_llama

import lora_ext

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BESIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "csrc/README.md",
    "emulator/README.md",
    "examples/README.md",
)
FILES = [*(ROOT / name for name in BESIDE), *PAGES]
# Pages whose code runs as it stands, block after block.
GUIDES = ("README", "index", "peft", "distributed", "troubleshooting", "many_adapters", "serving")
GUIDES += ("reinforcement-learning",)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


spec = importlib.util.spec_from_file_location("site_links", ROOT / "scripts" / "site_links.py")
site_links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_links)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def prose(text):
    """The text without code, in which brackets and parentheses are no links."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text):
    """What Markdown's headings can be linked by."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_links(path):
    """Relative links lead to files, and to headings where they name one."""
    for target in LINK.findall(prose(path.read_text())):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name_of(path)}: {target}"
        if anchor:
            assert anchor in anchors(linked.read_text()), f"{name_of(path)}: {target}"


def site_anchors(text):
    """The same on the site, where Python-Markdown's rule holds."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        anchor = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        found.append(f"{anchor}_{found.count(anchor)}" if anchor in found else anchor)
    return found


def texts_of_the_site():
    """The text of each page as the site has it, by its place there; "" is what has no links."""
    return {
        place: site_links.rewritten((ROOT / name).read_text(), place) if name.endswith("md") else ""
        for name, place in site_links.places().items()
    }


def dead_links(texts):
    """Links that lead to no page or no heading of the site."""
    dead = []
    for place, text in texts.items():
        for target in LINK.findall(prose(text)):
            file, _, anchor = target.partition("#")
            to = normpath(join(dirname(place), file)) if file else place
            lost = to not in texts or (anchor and anchor not in site_anchors(texts[to]))
            if lost and not re.match(r"https?:", target):
                dead.append(f"{place}: {target}")
    return dead


def test_no_link_of_the_site_is_dead():
    assert dead_links(texts_of_the_site()) == []


@pytest.mark.parametrize(
    "target", ["gone.md", "peft.md#gone", "#gone", "/peft.md", "../README.md", "../csrc/gone.md"]
)
def test_a_dead_link_of_the_site_is_seen(target):
    texts = texts_of_the_site()
    texts["layers.md"] += f"\n[words](peft.md), [words]({target})\n"
    assert dead_links(texts) == [f"layers.md: {target}"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_code_compiles(path):
    for language, code in FENCE.findall(path.read_text()):
        assert language, f"{path.name}: a block without a language"
        if language == "python":
            compile(textwrap.dedent(code), path.name, "exec")


@pytest.mark.parametrize("guide", GUIDES)
def test_the_guides_run(guide, tmp_path, monkeypatch, capsys):
    """With small models under the names that the text speaks of."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    names = {name: tiny_llama() for name in ("base_model", "other_model", "served_model")}
    names |= {"ids": torch.arange(8)[None]}
    if guide == "README":
        config = LoraConfig(target_modules=["q_proj"], r=4)
        get_peft_model(tiny_llama(), config).save_pretrained("a-folder-that-peft-wrote")
        names["batch"] = {"input_ids": names["ids"].repeat(3, 1), "labels": torch.ones(3, 8).long()}
    if guide == "troubleshooting":
        config = LoraConfig(target_modules=["q_proj", "v_proj"])
        names["model"] = get_peft_model(names.pop("base_model"), config)
    page = (ROOT if guide == "README" else DOCS) / f"{guide}.md"
    blocks = [code for language, code in FENCE.findall(page.read_text())]
    assert blocks
    for code in blocks:
        exec(compile(textwrap.dedent(code), f"{guide}.md", "exec"), names)
    if guide == "index":
        assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
        assert "fused" in capsys.readouterr().out
    if guide == "reinforcement-learning":
        names["urlopen"] = (sent := []).append
        model = lora_ext.apply_lora(tiny_llama(), lora_ext.LoraConfig(["q_proj"], r=4))
        assert names["send"](model, tmp_path, 3) == "policy-3"
        words = json.loads(sent[0].data)
        assert (
            sent[0].full_url.endswith("/v1/load_lora_adapter") and words["lora_name"] == "policy-3"
        )
        lora_ext.load_adapter(tiny_llama(), words["lora_path"])


def test_every_public_name_is_in_the_reference():
    written = re.findall(r"^::: lora_ext\.([\w.]+)$", (DOCS / "api.md").read_text(), re.M)
    assert len(set(written)) == len(written)
    for name in written:
        thing = lora_ext
        for part in name.split("."):
            thing = getattr(thing, part)
        assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
    top = {name for name in lora_ext.__all__ if not name.startswith("_")}
    assert len(top) <= 23 and top <= set(written)
    # Constants and second names are written once; reference and autotune have parts of their own.
    for module in ("adapters", "functional", "kernels", "loralib", "models", "nn", "pool"):
        public = set(getattr(lora_ext, module).__all__) - top - {"CARDS", "LoRALayer"}
        assert {f"{module}.{name}" for name in public} <= set(written)


def test_the_site_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r": ([\w-]+\.md)$", nav, re.M)  # in the nav, or in exclude_docs
    assert sorted(listed) == [path.name for path in PAGES]


class Page(HTMLParser):
    """What a page of the built site links to or shows, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id"))
        self.links |= {attrs[key] for key in ("href", "src") if attrs.get(key)}


def dead_in(site):
    """Links of the built pages to files or anchors that are not in its folder."""
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            to = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            to = to / "index.html" if to.is_dir() else to
            lost = not to.exists() or (
                to in pages and parts.fragment not in pages[to].anchors | {""}
            )
            if lost and not parts.scheme and not parts.netloc:
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None, reason="mkdocstrings is not installed"
)
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lora_ext.accelerate" in (tmp_path / "api" / "index.html").read_text()
    assert dead_in(tmp_path) == []
