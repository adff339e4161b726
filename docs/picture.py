"""Draw the pictures of pages that the documentation shows, each from one real run.

    python docs/picture.py                  all of them
    python docs/picture.py selection.png    one of them

Each runs a recipe in a temporary folder (one to five minutes), opens its report, or the page for talking to its
result, in a headless Chromium (Debian: apt-get install chromium chromium-driver) and writes what it shows to
``images/``; a picture of a terminal needs no browser.
"""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bellwether import load_recipe, run
from bellwether.arms.compare import compare
from bellwether.exchange.records import Event
from bellwether.report.report import report
from bellwether.tell.comparing import ComparisonStatus
from bellwether.tell.comparing_live import comparison_view
from bellwether.tools.progress import TRAINING

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "docs")]

from browser import DESKTOP, browser, missing, picture  # noqa: E402
from figures import drawn  # noqa: E402

HEIGHT = 1180  # of what is seen first, in pixels
TALK_WIDTH = 1200


def of_report(path: Path, recipe: str, fields: Sequence[str] = (), part: str = "") -> None:
    """Draw a part of a recipe's report; an empty part is what is seen first."""
    folder = f"output.folder=runs/{recipe}-1"
    page = report(run(load_recipe(recipe, [folder, *fields])).folder).absolute()
    with browser(DESKTOP[0], HEIGHT) as driver:
        driver.get(page.as_uri())
        picture(driver, path, whole=False, part=part)


def of_talk(path: Path, recipe: str, fields: Sequence[str], example: str) -> None:
    """Draw the page for talking to a comparison, when an example has been answered whose text begins so."""
    compare(load_recipe(recipe, fields), Path("demo"))
    draw_talk(path, Path("demo"), example)


class Taken(Exception):
    """The picture is taken, and the rest of a comparison is of no use to it."""


def of_comparison(path: Path, recipe: str, fields: Sequence[str], finished: int) -> None:
    """Draw what the terminal shows of a comparison when so many runs are done and the next one trains."""
    status = ComparisonStatus()

    def watch(event: Event) -> None:
        status.take(event)
        phases = [one.phase for one in status.running.values() if one.phase is not None]
        training = any(phase.phase == TRAINING and phase.done > 1 for phase in phases)
        if len(status.finished) == finished and training:
            path.write_text(drawn(comparison_view(status, 92, 24), "bellwether compare", "compare"), encoding="utf-8")
            raise Taken

    with contextlib.suppress(Taken):
        compare(load_recipe(recipe, fields), Path("comparison"), watch=watch)


def draw_talk(path: Path, folder: Path, example: str) -> None:
    """Draw the page for talking to what is finished in a folder."""
    from selenium.webdriver.support.ui import Select, WebDriverWait

    with served(folder) as address, browser(TALK_WIDTH, 600) as driver:
        driver.get(address)
        examples = Select(driver.find_element("id", "examples"))
        number = next(number for number, option in enumerate(examples.options) if option.text.startswith(example))
        examples.select_by_index(number)
        ask = driver.find_element("id", "ask")
        # Without the mouse and the focus, which would be seen.
        driver.execute_script("document.activeElement.blur(); arguments[0].click()", ask)
        WebDriverWait(driver, 60).until(lambda _: ask.is_enabled())
        picture(driver, path)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Yield the address of the page for talking that a process of its own serves."""
    command = [sys.executable, "-m", "bellwether", "ui", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield re.findall(r"http://\S+", server.stdout.readline() if server.stdout else "")[0]
        finally:
            server.send_signal(signal.SIGINT)


PICTURES: dict[str, Callable[[Path], None]] = {
    "report.png": functools.partial(of_report, recipe="default"),
    "selection.png": functools.partial(
        of_report,
        recipe="fedhds",
        fields=["federation.rounds=5", "federation.fraction=1.0"],
        part="#selection figure",
    ),
    "compare.svg": functools.partial(of_comparison, recipe="default-table", fields=(), finished=3),
    "talk.png": functools.partial(
        of_talk,
        recipe="default-table",
        fields=["compare.seeds=[15]"],
        example="information_extraction: Extract all people",
    ),
}


def main() -> None:
    """Run, open, take the pictures."""
    if reason := missing():
        sys.exit(reason)
    for name in sys.argv[1:] or PICTURES:
        with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
            PICTURES[name](ROOT / "docs" / "images" / name)


if __name__ == "__main__":
    main()
