"""Write the tables of ``methods-table`` into ``which-method.md``, from the folders of finished comparisons.

bellwether compare methods-table --out methods --jobs 2
python docs/methods.py uneven methods
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bellwether.exchange.scores import Totals, means
from bellwether.recipe.file import load_recipe
from bellwether.store.finished import read_run
from bellwether.tell.tables import markdown
from bellwether.tools.atomic import slug

PAGE = Path(__file__).parents[1] / "docs" / "which-method.md"
HEADS = ("", "learning rate", "test loss", "fedavg minus it", "ROUGE-L, %", "own rows: loss", "sent, MB")


def block(folder: Path) -> str:
    """Return the table of one comparison."""
    lines = json.loads((folder / "table.json").read_text(encoding="utf-8"))["lines"]
    return markdown(HEADS, [_cells(line, folder / slug(line["name"])) for line in lines])


def _cells(line: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the cells of an arm: what it scored, and what its runs used, means over seeds."""
    scores, gap = line["scores"], line["gaps"].get("loss")
    runs = [read_run(path / "run") for path in sorted(folder.glob("seed-*")) if (path / "run").is_dir()]
    rates = sorted({load_recipe(path / "run" / "recipe.yaml").training.learning_rate for path in folder.glob("seed-*/")
                    if (path / "run").is_dir()})  # fmt: skip
    own = [_own_loss(run.scored("clients")[-1].clients) for run in runs if run.scored("clients")]
    sent = [sum(record.bytes_up + record.bytes_down for record in run.rounds) / 1e6 for run in runs]
    return [
        line["name"],
        ", ".join(f"{rate:g}" for rate in rates),
        _interval(scores.get("loss"), 1, 3),
        _interval(gap, 1, 3) + (" =" if gap is not None and gap["p"] > 0.05 else ""),
        _interval(scores.get("rouge_l"), 100, 1),
        f"{sum(own) / len(own):.3f}" if own else "",
        f"{sum(sent) / len(sent):,.1f}" if sent else "",
    ]


def _own_loss(clients: Mapping[str, Mapping[str, Totals]]) -> float:
    """Return the mean over clients of the loss of what each serves on the rows that it holds out."""
    losses = [means(sum(totals.values(), start=Totals())).loss for totals in clients.values()]
    return sum(loss for loss in losses if loss is not None) / len(losses)


def _interval(found: Mapping[str, float] | None, scale: float, digits: int) -> str:
    if found is None:
        return ""
    mean, low, high = (f"{found[name] * scale:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def main() -> None:
    """Put a table into the page."""
    name, folder = sys.argv[1:]
    marked = re.compile(rf"(<!-- {name}:begin -->\n).*(<!-- {name}:end -->)", re.DOTALL)
    text = block(Path(folder))
    PAGE.write_text(marked.sub(lambda place: place[1] + text + place[2], PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
