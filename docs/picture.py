"""Draw the picture of the report that the README shows, from one real default run.

    python docs/picture.py

It runs the default recipe in a temporary folder (one to three minutes), opens its report in a headless Chromium
(Debian: apt-get install chromium chromium-driver) and writes what is seen first to ``images/report.png``.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from bellwether import load_recipe, run
from bellwether.report import report

ROOT = Path(__file__).parents[1]
HEIGHT = 1180  # of what is seen, in pixels


def main() -> None:
    """Run, report, take the picture."""
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import DESKTOP, browser, missing, picture

    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        page = report(run(load_recipe("default", ["output.folder=runs/default-1"])).folder).absolute()
        with browser(DESKTOP[0], HEIGHT) as driver:
            driver.get(page.as_uri())
            picture(driver, ROOT / "docs" / "images" / "report.png", whole=False)


if __name__ == "__main__":
    main()
