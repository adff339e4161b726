"""Measure the README's figures and draw the documentation's pictures, from one real default run.

    python docs/figures.py

It runs the default recipe in a temporary folder (one to three minutes), writes what the terminal shows in mid-run to
``images/live.svg``, what each client holds to ``images/clients.png``, and the final table, with where and
how it was measured, into the marked place of the README.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import platform
import re
import resource
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from bellwether.exchange.records import Event
from bellwether.recipe.file import dump_recipe, load_recipe
from bellwether.report.holdings import draw
from bellwether.runner.describe import describe
from bellwether.runner.prepare import prepare
from bellwether.runner.run import Result, run
from bellwether.tell.live import summary, view
from bellwether.tell.status import RunStatus
from bellwether.tools.progress import Advanced

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
STARTER = [ROOT / "bellwether" / room / "starter" for room in ("model", "data")]
# Rich's own picture of a terminal, without the font that it would load from elsewhere.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def drawn(shown: RenderableType, title: str, unique_id: str) -> str:
    """Return what a terminal of 92 columns shows, as SVG."""
    console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True)
    console.print(shown)
    return console.export_svg(title=title, theme=DEFAULT_TERMINAL_THEME, code_format=SVG, unique_id=unique_id)


class Camera:
    """A watcher that keeps what the terminal shows when some clients of a round have answered."""

    def __init__(self, round: int, answered: int) -> None:
        self.status, self.round, self.answered = RunStatus(), round, answered
        self.picture: str | None = None

    def __call__(self, event: Event) -> None:
        """Take an event, and the picture when it is time."""
        self.status.take(event)
        there = self.status.round == self.round and len(self.status.finished) == self.answered
        if self.picture is None and there and isinstance(event, Advanced) and event.done > 1:
            self.picture = drawn(view(self.status, 92, 24), "bellwether run", "live")


def default_run_hash() -> str:
    """Return a hash of what the figures rest on: the embedded base and rows, and the default recipe."""
    digest = hashlib.sha256(dump_recipe(load_recipe("default")).encode())
    for path in (STARTER[0] / "model.safetensors", *sorted(STARTER[1].glob("*.jsonl"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def figures(result: Result, seconds: float) -> str:
    """Return the marked place of the README: how it was measured, and the final table."""
    console = Console(record=True, width=92, file=io.StringIO())
    console.print(summary(result.evaluations))
    table = "\n".join(line.rstrip() for line in console.export_text().splitlines() if line.strip())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    threads = torch.get_num_threads()
    digest = default_run_hash()
    return (
        f"<!-- default run {digest} -->\n```text\n{table}\n```\n\n"
        f"Measured with `bellwether run` (recipe `default`, seed 0): {seconds:.0f} s, {memory:.1f} GB of memory,\n"
        f"{threads} of {os.cpu_count()} cores, {platform.system()} {platform.machine()}, PyTorch {torch.__version__}.\n"
    )


def main() -> None:
    """Run, draw, write."""
    camera, start = Camera(round=12, answered=3), time.perf_counter()
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        result = run(load_recipe("default"), watch=camera)
    seconds = time.perf_counter() - start
    readme = ROOT / "README.md"
    marked = re.compile(r"(<!-- figures:begin -->\n).*(<!-- figures:end -->)", re.DOTALL)
    text = marked.sub(lambda place: place[1] + figures(result, seconds) + place[2], readme.read_text(encoding="utf-8"))
    readme.write_text(text, encoding="utf-8")
    if camera.picture is not None:
        (IMAGES / "live.svg").write_text(camera.picture, encoding="utf-8")
    prepared = prepare(load_recipe("default"))
    for path in draw(describe(prepared.federated, prepared.clients), IMAGES):
        if path.suffix == ".svg":
            path.unlink()


if __name__ == "__main__":
    main()
