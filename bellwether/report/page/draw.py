"""Drawing: a matplotlib figure becomes an SVG inside the page, in the page's own colours and letters.

Charts are drawn in stand-in colours, which become the page's custom properties: the same drawing reads well in light
and in dark. Styles become attributes, so that the page's content security policy needs to allow no style but its own
sheet. Equal data give equal bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
# Colours, markers and dashes of series; several of them together tell series apart without any colour.
SERIES = tuple(f"#01020{number}" for number in range(1, 9))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (8, 3)),
    (0, (3, 1.5, 1.5, 1.5, 1.5, 1.5)),
    (0, (4, 1)),
    (0, (2, 3)),
)
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    PAPER: "var(--paper)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(SERIES, start=1)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_DECIMALS = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def drawing(name: str, label: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Markup:
    """Return a chart as SVG for a page.

    Args:
        name: of letters, digits and hyphens, unlike those of the page's other charts.
        label: what it shows, for those who cannot see it.
        size: width and height in units of which a letter is ten high.
        draw: draws on an empty figure; it must use no colour but this module's.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        matplotlib.rcdefaults()  # whatever a person's own matplotlibrc says
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure = Canvas(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        draw(figure)
        return _inline(_svg(figure), name, label)


def _svg(figure: Figure) -> bytes:
    """Return a figure as matplotlib's SVG, laid out once: ``savefig`` would draw all of it a first time for that."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)  # in whose letters the layout is measured
    engine = figure.get_layout_engine()
    if engine is not None and figure.axes:
        engine.execute(figure)
    figure.set_layout_engine(None)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=72, metadata={"Date": None})
    return buffer.getvalue()


def _inline(svg: bytes, name: str, label: str) -> Markup:
    """Return matplotlib's SVG as an element of a page."""
    root = ElementTree.fromstring(svg)
    for child in [child for child in root if child.tag == f"{_SVG}metadata"]:
        root.remove(child)
    for defs in root.iter(f"{_SVG}defs"):
        for sheet in defs.findall(f"{_SVG}style"):
            defs.remove(sheet)
    text = svg.decode()
    used = {*_REFERENCE.findall(text), *re.findall(r'href="#([^"]+)"', text)}
    box = root.get("viewBox", "")
    root.attrib.clear()
    for element in root.iter():
        _translate(element, name, used)
    root.attrib |= {"viewBox": box, "class": "chart", "role": "img", "aria-label": label}
    # The SVG is of matplotlib's making, and every text in it is escaped again here.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _translate(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Give an element plain names, attributes instead of styles, and the page's colours."""
    element.tag = element.tag.removeprefix(_SVG)
    old = dict(element.attrib)
    element.attrib.clear()
    styles = [part.partition(":") for part in old.pop("style", "").split(";") if part.strip()]
    for key, value in [*old.items(), *((key.strip(), value.strip()) for key, _, value in styles)]:
        if key == _HREF:
            element.set("href", f"#{name}-{value.removeprefix('#')}")
        elif key == "id":
            if value in used:
                element.set("id", f"{name}-{value}")
        elif key not in ("font-family", "font-stretch", "stroke-linejoin", "stroke-linecap", "stroke-miterlimit"):
            value = _VARIABLES.get(value, _REFERENCE.sub(rf"url(#{name}-\1)", value))
            element.set(key, _DECIMALS.sub(_short, value))
    if element.text is not None and not element.text.strip():
        element.text = None
    element.tail = None


def _short(number: re.Match[str]) -> str:
    """Return a number with two decimals at most; a letter is ten high."""
    text = f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
