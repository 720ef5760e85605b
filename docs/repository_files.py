"""Let pages link to files outside docs/; mkdocs calls these functions while it builds the site (`hooks` in mkdocs.yml).

Pages link to the repository's files by relative paths, `../examples/README.md`, which a reader on GitHub can follow.
The site gets a copy of every such file under `repository/`, and of the files that a copied page links to. Links between
pages and copies are rewritten to their paths on the site. The home page of the site is README.md.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIES = "repository/"
HOME = "README.md"
_TARGET = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)[^)#\s]+")


def _in_repository(page: str, target: str) -> str | None:
    """Path from the repository's root of the file that a link of a page leads to; None where there is no such file."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _on_site(path: str) -> str:
    """Path on the site of a file of the repository."""
    if path == HOME:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else COPIES + path


def _of_site(uri: str) -> str:
    """Path from the repository's root of a file on the site."""
    if uri == "index.md":
        return HOME
    return uri.removeprefix(COPIES) if uri.startswith(COPIES) else f"docs/{uri}"


def _linked(page: str) -> Iterator[str]:
    """Files outside docs/ that a page links to, and those that they link to."""
    for target in _TARGET.findall((ROOT / page).read_text(encoding="utf-8")):
        path = _in_repository(page, target)
        if path is not None and not path.startswith("docs/"):
            yield path


def on_files(files: Files, config: Any) -> Files:
    """Add a copy of each file that pages link to."""
    pages = [HOME, *(_of_site(file.src_uri) for file in files.documentation_pages())]
    files.append(File.generated(config, _on_site(HOME), abs_src_path=str(ROOT / HOME)))
    copied = {HOME}
    while pages:
        for path in set(_linked(pages.pop())) - copied:
            copied.add(path)
            files.append(File.generated(config, _on_site(path), abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                pages.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write the links of a page as the site needs them. A link to no file stays as it is, and mkdocs reports it."""
    uri = page.file.src_uri

    def rewritten(target: re.Match[str]) -> str:
        path = _in_repository(_of_site(uri), target[0])
        return target[0] if path is None else posixpath.relpath(_on_site(path), posixpath.dirname(uri) or ".")

    return _TARGET.sub(rewritten, markdown)
