"""Write the tables of the comparison into ``measured.md``, from the folder of a finished one.

bellwether compare fedit-table --out table --jobs 2
python docs/comparison.py table
python docs/plots.py
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bellwether.exchange.scores import macro
from bellwether.recipe.file import find_recipe
from bellwether.store.comparison import Outcome, read_outcomes
from bellwether.tell.tables import markdown

ROOT = Path(__file__).parents[1]
STARTER = [ROOT / "bellwether" / room / "starter" for room in ("model", "data")]
HEADS = ("", "loss", "ROUGE-L, %", "exact match, %", "federated minus it: loss", "exact match, points")
STEPS = ", 1000 steps"


def comparison_hash() -> str:
    """Return a hash of what the table rests on: the embedded base and rows, and what the recipe says."""
    settings = yaml.safe_load(find_recipe("fedit-table").read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in (STARTER[0] / "model.safetensors", *sorted(STARTER[1].glob("*.jsonl"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def block(folder: Path) -> str:
    """Return what stands in the marked place of ``measured.md``."""
    lines = json.loads((folder / "table.json").read_text(encoding="utf-8"))["lines"]
    main = [line for line in lines if STEPS not in line["name"]]
    steps = [line for line in lines if STEPS in line["name"]]
    categories = [line for line in main if line["categories"]]
    names = sorted(categories[0]["categories"])
    by_category = [
        [line["name"], *(f"{100 * line['categories'][name]['exact']['mean']:.0f}" for name in names)]
        for line in categories
    ]
    return (
        f"<!-- comparison {comparison_hash()} -->\n"
        + markdown(HEADS, [_cells(line) for line in main])
        + f"\n{_order(folder)}\n\nWith a thousand optimizer steps for everybody (the federation's are added up over\n"
        "its clients), where three of the ten clients train alone, client-01 to client-03:\n\n"
        + markdown(HEADS, [_cells(line) for line in steps])
        + "\nExact match by category, in percent:\n\n"
        + markdown(["", *names], by_category)
    )


def _cells(line: Mapping[str, Any]) -> list[str]:
    """Return the cells of a line: scores, and how far the federated arm is from it."""
    scores, gaps = line["scores"], line["gaps"]
    found = [
        _interval(scores.get("loss"), 1, 3),
        *(_interval(scores.get(name), 100, 1) for name in ("rouge_l", "exact")),
    ]
    return [line["name"], *found, _gap(gaps.get("loss"), 1, 3), _gap(gaps.get("exact"), 100, 1)]


def _interval(found: Mapping[str, float] | None, scale: float, digits: int) -> str:
    if found is None:
        return ""
    mean, low, high = (f"{found[name] * scale:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _gap(found: Mapping[str, float] | None, scale: float, digits: int) -> str:
    shown = _interval(found, scale, digits)
    return f"{shown}, not distinguishable" if found is not None and found["p"] > 0.05 else shown


def _order(folder: Path) -> str:
    """Return the sentence on how often the order that FedIT's paper expects holds, client by client."""
    found = {name: _exact(read_outcomes(path) for path in sorted((folder / name).iterdir())) for name in ARMS}
    pairs = [(seed, value) for seed, client, value in found["local"]]
    base, federated = ({seed: value for seed, _, value in found[name]} for name in ("base", "federated"))
    above = sum(value > base[seed] for seed, value in pairs)
    below = sum(value < federated[seed] for seed, value in pairs)
    return (
        f"Of {len(pairs)} clients in ten federations, {above} are better alone than the untuned base, and {below} are "
        "worse alone than the federated model (exact match, all categories)."
    )


ARMS = ("base", "local", "federated")


def _exact(outcomes: Any) -> list[tuple[int, str, float]]:
    several: Sequence[Outcome] = [outcome for some in outcomes for outcome in some]
    return [(one.seed, one.client, macro(one.by_category()).exact or 0.0) for one in several]


def main() -> None:
    """Put the tables into the page."""
    page = ROOT / "docs" / "measured.md"
    marked = re.compile(r"(<!-- comparison:begin -->\n).*(<!-- comparison:end -->)", re.DOTALL)
    text = block(Path(sys.argv[1]))
    page.write_text(marked.sub(lambda place: place[1] + text + place[2], page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
