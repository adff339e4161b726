"""Draw the pictures of reports that the documentation shows, each from one real run.

    python docs/picture.py                  all of them
    python docs/picture.py selection.png    one of them

Each runs a recipe in a temporary folder (one to three minutes), opens its report in a headless Chromium
(Debian: apt-get install chromium chromium-driver) and writes a part of it to ``images/``.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from bellwether import load_recipe, run
from bellwether.report.report import report

ROOT = Path(__file__).parents[1]
HEIGHT = 1180  # of what is seen first, in pixels


@dataclass(frozen=True)
class Picture:
    """What a picture shows: a recipe with its overrides, and a part of its report; empty is what is seen first."""

    recipe: str
    fields: list[str] = field(default_factory=list)
    part: str = ""


PICTURES = {
    "report.png": Picture("default"),
    "selection.png": Picture("fedhds", ["federation.rounds=5", "federation.fraction=1.0"], "#selection figure"),
}


def main() -> None:
    """Run, report, take the pictures."""
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import DESKTOP, browser, missing, picture

    if reason := missing():
        sys.exit(reason)
    for name in sys.argv[1:] or PICTURES:
        shown = PICTURES[name]
        with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
            folder = f"output.folder=runs/{shown.recipe}-1"
            page = report(run(load_recipe(shown.recipe, [folder, *shown.fields])).folder).absolute()
            with browser(DESKTOP[0], HEIGHT) as driver:
                driver.get(page.as_uri())
                picture(driver, ROOT / "docs" / "images" / name, whole=False, part=shown.part)


if __name__ == "__main__":
    main()
