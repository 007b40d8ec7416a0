"""A hook of mkdocs: no link of the site leads to a file that is not on it.

Pages link to files of the repository beside docs/, such as reports of benchmarks. Those files, with
the pictures that they show, are put on the site under repository/. Where one of them links to a
further file of the repository, which is not on the site, the text stays without its link.
"""

import re
from functools import cache
from os.path import relpath
from pathlib import Path
from posixpath import dirname, join, normpath

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\[[^\]]*\])\(([^)\s#]+)([^)\s]*)\)")
BESIDE = "repository/"


def _linked(name: str) -> set[str]:
    """The files of the repository to which this one links, by their names there."""
    found = {normpath(join(dirname(name), target)) for _, target, _ in LINK.findall(_read(name))}
    return {each for each in found if ROOT.joinpath(each).is_file()}


def _read(name: str) -> str:
    return ROOT.joinpath(name).read_text()


@cache
def places() -> dict[str, str]:
    """What is on the site, by its name in the repository: where it is there."""
    pages = {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")}
    beside = set().union(*map(_linked, pages)) - pages
    texts = {name for name in beside if name.endswith(".md")}
    beside |= {each for each in set().union(*map(_linked, texts)) if each.endswith(".png")}
    found = {name: name.removeprefix("docs/") for name in pages}
    return found | {name: BESIDE + name for name in beside}


def rewritten(text: str, place: str) -> str:
    """A page's text with the links that it has on the site."""
    there = places()
    [name] = [name for name, where in there.items() if where == place]

    def link(match: re.Match) -> str:
        shown, target, anchor = match.groups()
        linked = normpath(join(dirname(name), target))
        if linked in there:
            return f"{shown}({relpath(there[linked], dirname(place) or '.')}{anchor})"
        return shown[1:-1] if ROOT.joinpath(linked).exists() else match[0]

    return LINK.sub(link, text)


def on_files(files, config):
    from mkdocs.structure.files import File

    places.cache_clear()  # of `mkdocs serve`, which builds more than once
    for name, place in places().items():
        if place.startswith(BESIDE):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, **_):
    return rewritten(markdown, page.file.src_uri)
