"""README.md and docs/: the code runs, commands print what is shown, quoted messages and linked files exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks import console_examples
from effkernels import _library
from effkernels.models.peers import import_timm

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples/README.md", *DOCS)
# Pages whose Python needs a test of its own: files that it writes, or processes without the package.
OTHER_TESTS = {
    "deployment.md": "test_export_deploy.py",
    "models.md": "test_models_pretrained.py",
    "scaling.md": "test_scaling_docs.py",
}
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_python(page: Path) -> dict[str, object]:
    """Run the Python of a page, block after block in one session; returns the session."""
    session: dict[str, object] = {"__name__": page.stem}
    for block in PYTHON.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, page.name, "exec"), session)
    return session


@pytest.mark.slow
def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage", reason="the photograph is scikit-image's")
    import_timm()  # the block imports timm itself, which beside a CPU-only torch works after this alone
    assert len(PYTHON.findall(README.read_text(encoding="utf-8"))) == 2
    logits = run_python(README)["logits"]
    printed = capsys.readouterr().out
    assert "18 of 18 blocks run fused" in printed
    assert "torch.return_types.topk" in printed
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (5, 1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in DOCS if PYTHON.search(page.read_text(encoding="utf-8"))],
    ids=lambda page: page.name,
)
def test_the_python_of_the_pages_runs(page: Path) -> None:
    if page.name in OTHER_TESTS:
        assert page.name in (ROOT / "tests" / OTHER_TESTS[page.name]).read_text(encoding="utf-8")
        return
    pytest.importorskip("skimage", reason="the photographs are scikit-image's")
    run_python(page)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_pages_show_every_command_with_its_output() -> None:
    shown = [line for page in console_examples.PAGES for line in console_examples.commands(page.read_text("utf-8"))]
    assert all(any(f"effkernels {name}" in line for line in shown) for name in ("info", "check", "predict", "explain"))


@pytest.mark.skipif(not _library.is_loaded(), reason=f"no plan without the library: {_library.load_error()}")
def test_the_launch_plan_shown_is_the_one_of_this_library() -> None:
    """The one output shown that is the same on every machine."""
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    assert console_examples.with_outputs(page, ROOT) == page, "python -m benchmarks.console_examples"


def relative_links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            yield page, target


def test_every_relative_link_leads_to_a_file() -> None:
    """These are the links on GitHub; `make docs` checks the anchors, too."""
    links = list(relative_links())
    assert len(links) > 50
    missing = [f"{page.name}: {target}" for page, target in links if not (page.parent / target).exists()]
    assert missing == []


# ------------------------------------------------------------------------------------------------- quoted messages


def template(node: ast.expr) -> str:
    """Return a string of Python with `...` for each value."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(template(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left) + template(right)
    return "..."


@cache
def messages() -> str:
    """Return every string of the sources that can be part of a message, a line each, with `...` for each value."""
    lines = []
    for file in [*ROOT.glob("effkernels/**/*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                lines.append(template(node))
    for file in ROOT.glob("csrc/ops/*.cpp"):
        for check in re.findall(r"STD_TORCH_CHECK\((.*?)\);\n", file.read_text(encoding="utf-8"), re.DOTALL):
            lines.append("...".join(re.findall(r'"((?:[^"\\]|\\.)*)"', check)))
    for name in ("Makefile", "CMakeLists.txt"):
        lines += re.sub(r'"\s*(?:\\\n)?\s*"', " ", (ROOT / name).read_text(encoding="utf-8")).splitlines()
    return "\n".join(" ".join(line.split()) for line in lines)


def quoted_messages() -> list[str]:
    """Return the first cells of the tables of docs/troubleshooting.md."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def occurs(quote: str) -> bool:
    """Return whether the parts of a quote around `...` follow each other in one message."""
    parts = [re.escape(" ".join(part.split())) for part in quote.split("...") if part.strip()]
    return re.search("[^\n]*?".join(parts), messages()) is not None


def test_every_row_of_the_troubleshooting_page_quotes_a_message() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    heads = {"| message | what to do |", "| reason | what to do |", "|---|---|"}
    rows = [line for line in page.splitlines() if line.startswith("|") and line not in heads]
    assert len(rows) == len(quoted_messages()) > 100


@pytest.mark.parametrize("quote", quoted_messages())
def test_a_quoted_message_occurs_in_the_sources(quote: str) -> None:
    assert occurs(quote)


def test_a_message_that_does_not_exist_is_noticed() -> None:
    assert not occurs("the compiled library is on holiday")
    assert not occurs("the engine is closed... stride=")
