"""Drawing: a chart becomes an SVG inside the page, in the page's own colours and letters, and files for a paper.

Charts are drawn in the page's light colours. On a page these become its custom properties, so that the same drawing
reads well in light and in dark, and styles become attributes, so that the page's content security policy needs to
allow no style but its own sheet. For a paper a chart is laid out anew, as wide as a column. Equal data give equal
bytes.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from bellwether.report.page.parts import visible
from bellwether.report.page.place import WIDTH, extent, legend_height, place
from bellwether.tools.version import VERSION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# As style.css has them in light.
INK, MUTED, GRID, PAPER = "#16202b", "#566371", "#d9e0e7", "#ffffff"
# Colours, markers and dashes of series; several of them together tell series apart without any colour.
SERIES = ("#0072b2", "#d55e00", "#00916a", "#bb5f99", "#c98a00", "#5b4bb5", "#4aa3dc", "#75818d")
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
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    PAPER: "var(--paper)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(SERIES, start=1)},
}
LETTER, PRINTED_LETTER = 10.0, 8.0  # points
COLUMN = 252.0  # points: a column of a paper in two columns
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # letters stay letters, which journals ask for
    "text.parse_math": False,
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


@dataclass(frozen=True)
class Chart:
    """A chart, which is drawn where it is shown.

    Args:
        name: of letters, digits and hyphens, unlike those of the page's other charts.
        label: what it shows, for those who cannot see it.
        height: without its legend, in units of which a letter is ten high.
        draw: draws on an empty figure; it must use no colour but this module's.
        legend: the names in its legend.
        wide: whether it takes the width of two.
    """

    name: str
    label: str
    height: float
    draw: Callable[[Figure], None]
    legend: Sequence[str] = ()
    wide: bool = False

    def inline(self) -> Markup:
        """Return the chart as SVG for a page."""
        with self._drawn(extent(self.wide), LETTER) as figure:
            svg = _saved(figure, "svg", {"Date": None})
        return _inline(svg, self.name, self.label)

    def printed(self) -> dict[str, bytes]:
        """Return the chart for a paper by file name, as SVG and as PDF: a column wide, or the text of two columns."""
        about = {"Title": visible(self.label), "Creator": f"bellwether {VERSION}"}
        width = COLUMN * LETTER / PRINTED_LETTER
        with self._drawn(width * extent(self.wide) / WIDTH, PRINTED_LETTER, {"svg.fonttype": "path"}) as figure:
            return {
                f"{self.name}.svg": _saved(figure, "svg", {**about, "Date": None}),
                f"{self.name}.pdf": _saved(figure, "pdf", {**about, "CreationDate": None}),
            }

    @contextlib.contextmanager
    def _drawn(self, width: float, letter: float, style: dict[Any, Any] | None = None) -> Iterator[Figure]:
        """Yield the figure, laid out, in the style in which it is to be saved.

        Args:
            width: of the figure, in units of which a letter is ten high.
            letter: the height of a letter in points.
            style: matplotlib's settings beside ours.
        """
        import matplotlib
        from matplotlib.figure import Figure as Canvas

        height = self.height + legend_height(self.legend, width)
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            matplotlib.rcdefaults()  # whatever a person's own matplotlibrc says
            sizes: dict[Any, Any] = {"font.size": letter, "legend.fontsize": 0.95 * letter, "svg.hashsalt": self.name}
            matplotlib.rcParams.update({**_STYLE, **sizes, **(style or {})})
            figure = Canvas(figsize=(width * letter / 720, height * letter / 720), dpi=72)
            self.draw(figure)
            place(figure)
            yield figure


def _saved(figure: Figure, kind: str, about: dict[str, Any]) -> bytes:
    """Return a figure in one of matplotlib's formats."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=72, metadata=about)
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
            value = VARIABLES.get(value, _REFERENCE.sub(rf"url(#{name}-\1)", value))
            element.set(key, _DECIMALS.sub(_short, value))
    if element.text is not None and not element.text.strip():
        element.text = None
    element.tail = None


def _short(number: re.Match[str]) -> str:
    """Return a number with two decimals at most; a letter is ten high."""
    text = f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
