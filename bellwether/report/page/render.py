"""A page as HTML: one file that loads nothing, runs nothing, and shows whatever stands in data as what it is.

Every value is escaped by the template, and its hidden characters are shown, unless it is markup that was made here.
The content security policy allows the page's own style sheet by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bellwether.report.page.parts import Page, one_line, visible
from bellwether.tools.version import VERSION

_FOLDER = Path(__file__).parent
_BREAKS = re.compile(r"(?<=[\w)][-_/.:])(?=\w{3})")


def render(page: Page) -> bytes:
    """Return a page as HTML in UTF-8; the same page gives the same bytes.

    Args:
        page: what stands on it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"one_line": one_line, "soft": _soft, "visible": visible}
    style = (_FOLDER / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = environment.get_template("template.html")
    html = template.render(page=page, style=Markup(style), style_hash=f"sha256-{digest}", version=VERSION)
    return html.lstrip().encode()


def _soft(text: str) -> Markup:
    """Return a name that may be broken after its hyphens and the like."""
    return Markup("<wbr>").join(_BREAKS.split(visible(text)))


def _finalize(value: Any) -> Any:
    """Return a value as the template shall show it: text from elsewhere with its hidden characters seen."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
