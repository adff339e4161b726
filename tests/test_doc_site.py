"""The documentation as a site: built strictly, complete, and without a word from elsewhere."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import DESKTOP, foreign, resize
from forked import Forked
from test_docs import ROOT, blocks

import bellwether

SITE = ROOT / "docs" / "site"
NARROW = (360, 780)


def build(source: Path, out: Path, *settings: str) -> tuple[int, str]:
    """Build a site as ``make docs`` does; return the exit code and what was said."""

    def do() -> None:
        from sphinx.cmd.build import build_main

        options = [
            "--fail-on-warning",
            "--keep-going",
            "--quiet",
            "--conf-dir",
            SITE,
            "--doctree-dir",
            out / "doctrees",
        ]
        raise SystemExit(build_main([*map(str, options), *settings, str(source), str(out / "html")]))

    process = Forked(do)
    said, errors = process.communicate()
    assert process.returncode is not None
    return process.returncode, said + errors


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    out = tmp_path_factory.mktemp("site")
    code, said = build(ROOT, out)
    assert code == 0, said
    return out / "html"


def test_the_makefile_builds_the_site_as_the_tests_do() -> None:
    recipe = (ROOT / "Makefile").read_text().split("docs: install\n")[1].splitlines()[0]
    assert "sphinx-build --fail-on-warning --keep-going --quiet --conf-dir docs/site" in recipe


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|img|link|iframe|source|video|audio|object|embed)\b[^>]*>", text)
        loaded = [url for tag in tags for url in re.findall(r'\b(?:src|href|data|srcset)="([^"]*)"', tag)]
        assert loaded
        assert not [url for url in loaded if urlsplit(url).scheme not in ("", "data") or urlsplit(url).netloc], page
    for style in site.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", style.read_text(encoding="utf-8"))
        assert not [url for url in urls if urlsplit(url).netloc], style


def test_pages_fit_a_telephone_and_ask_nobody(site: Path, chromium: Any) -> None:
    for page in ("docs/site/index", "README", "docs/measured", "docs/recipes", "docs/site/reference"):
        for size in (NARROW, DESKTOP):
            resize(chromium, *size)
            chromium.get((site / f"{page}.html").as_uri())
            width = chromium.execute_script("return document.documentElement.scrollWidth")
            assert width <= size[0], f"{page} is {width} pixels wide on a screen of {size[0]}"
    assert not foreign(chromium)


# What is broken ends the build ---------------------------------------------------------------------

BROKEN = {
    "docs/page.md": "# Page\n\n[there](nowhere.md) [there](#no-anchor) ![there](nowhere.png)\n",
    "docs/lonely.md": "# No list of pages names this one\n",
    "docs/site/index.rst": """\
Index
=====

.. toctree::

   ../page
   ../missing

.. api:: bellwether.nonesuch
.. api:: bellwether.exchange.adapter.Tensors
.. api:: bellwether.State
""",
}
SAID = [
    "page.md:3: WARNING: 'myst' cross-reference target not found: 'nowhere.md'",
    "page.md:3: WARNING: 'myst' cross-reference target not found: 'no-anchor'",
    "page.md:3: WARNING: image file not readable: docs/nowhere.png",
    "lonely.md: WARNING: document isn't included in any toctree",
    "index.rst:4: WARNING: toctree contains reference to nonexisting document 'docs/missing'",
    "index.rst:9: ERROR: The reference names bellwether.nonesuch, which is not in the package.",
    "index.rst:10: ERROR: bellwether.exchange.adapter.Tensors stands in the reference and has no docstring.",
    "WARNING: py:class reference target not found: bellwether.exchange.adapter.Adapter",
]


def test_whatever_is_broken_is_told_and_ends_the_build(tmp_path: Path) -> None:
    for name, text in BROKEN.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text(text)
    code, told = build(tmp_path / "source", tmp_path / "out")
    assert code != 0
    assert not [sentence for sentence in SAID if sentence not in told], told


# The reference ------------------------------------------------------------------------------------


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The names that the reference describes, each under the one it was given in the source."""
    monkeypatch.syspath_prepend(str(SITE))
    import reference

    yield {at_home(name) for name in reference.documented(SITE / "reference.rst")}
    sys.modules.pop("reference")


def at_home(name: str) -> str:
    """Return the full name of what the package itself lends a short one."""
    home = bellwether._HOMES.get(name.removeprefix("bellwether."))
    return f"bellwether.{home}.{name.rpartition('.')[2]}" if home else name


def imported(page: Path) -> set[str]:
    """Return the names of bellwether's that the Python of a page imports."""
    texts = [block.text for block in blocks(page) if block.language == "python"]
    found = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in found if node.module and node.module.partition(".")[0] == "bellwether"]
    return {at_home(f"{node.module}.{name.name}") for node in ours for name in node.names}


def test_the_reference_describes_every_public_name(documented: set[str]) -> None:
    assert {at_home(f"bellwether.{name}") for name in bellwether.__all__} - documented == {"bellwether.__version__"}


@pytest.mark.parametrize("page", ["python.md", "results.md", "report.md", "your-own-method.md"])
def test_the_reference_describes_what_the_pages_for_users_call(page: str, documented: set[str]) -> None:
    missing: Any = imported(ROOT / "docs" / page) - documented
    # The sections of a recipe stand in the table of its fields.
    assert not {name for name in missing if not name.startswith("bellwether.recipe.recipe.")}
