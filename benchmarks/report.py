"""What was measured, as tables and a picture; every figure in the README is one of the JSON files'.

    python -m benchmarks.report

writes the parts of ``docs/measured.md``, ``benchmarks/README.md`` and ``docs/selection.md`` between their markers anew,
and ``results/rounds.png`` and ``.svg``. After it, ``python docs/plots.py`` draws the README's plots of the first anew.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from bellwether.tools.words import counted
from benchmarks import choosing, over_sites, ways
from benchmarks import phases as run_phases
from benchmarks import survey as surveys
from benchmarks.markdown import Measured, table, where

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"
SELECTION = FOLDER.parent / "docs" / "selection.md"
BRIEF = FOLDER.parent / "docs" / "measured.md"
START = "<!-- measured: written by python -m benchmarks.report -->\n"
END = "<!-- end of what was measured -->\n"
NOTHING = "Nothing has been measured yet: `make bench` does, and writes this part.\n"

TITLES = {"released": "As released", "equal": "Equal work"}
ENOUGH = 0.9


def write(folder: Path, name: str, measured: Measured) -> None:
    """Write what was measured to a JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(measured, indent=1) + "\n")


def read(folder: Path) -> dict[str, Measured]:
    """Return what a folder holds, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def block(readme: Path = README) -> str:
    """Return what stands between the markers."""
    return readme.read_text().split(START)[1].split(END)[0]


def write_block(text: str, readme: Path = README) -> None:
    """Replace what stands between the markers."""
    before, rest = readme.read_text().split(START)
    readme.write_text(before + START + text + END + rest.split(END)[1])


def render(results: Mapping[str, Measured]) -> str:
    """Return all tables as Markdown."""
    parts = []
    if any(name.startswith("rounds-") for name in results):
        parts.append("![Seconds a round, and how they grow](results/rounds.png)\n")
    parts += [rounds(results[name]) for name in _rounds_names(results)]
    single = {"growth": growth, "survey": survey, "phases": phases, "startup": startup, "gpu": gpu, "gemma": gemma}
    single |= {"generation": generation}
    single |= {"federation": over_sites.costs, "federation-kills": over_sites.kills, "network": over_sites.network}
    single |= {"simulation": over_sites.simulation, "secure": over_sites.secure}
    parts += [show(results[name]) for name, show in single.items() if name in results]
    parts += [choosing.unseen(found) for name, found in results.items() if name.startswith("unseen-")]
    parts += [choosing.coreset(results["coreset"])] if "coreset" in results else []
    return "\n" + "\n".join(parts) + "\n" if parts else f"\n{NOTHING}\n"


def _rounds_names(results: Mapping[str, Measured]) -> list[str]:
    """Return the names of tables of rounds, narrow models first, as released before equal work."""
    names = [name for name in results if name.startswith("rounds-")]
    return sorted(names, key=lambda name: (results[name]["setting"]["hidden"], results[name]["table"] != "released"))


# Rounds -------------------------------------------------------------------------------------------


def rounds(measured: Measured) -> str:
    """Return the table of a setting, the floor, and what eats the rest of the rivals' time."""
    setting, rows = measured["setting"], measured["ways"]
    fastest, total = _median(rows[ways.OURS]), sum(measured["operations"].values())
    lines = [
        (
            name,
            _spread(row["seconds"]),
            f"{_median(row) / fastest:.2f}",
            _of_bare(row, rows),
            _percent(total / measured["rates"][row["dtype"]] / _median(row)),
            f"{row['import']:.1f}",
            f"{row['build']:.1f}",
            f"{row['first']:.2f}",
            _mebibytes(row["peak"]),
        )
        for name, row in rows.items()
    ]
    head = (
        "way",
        "seconds a round (least to most)",
        "times bellwether's",
        "share of its bare loop",
        "share of the floor",
        "imports, s",
        "building, s",
        "first round, s",
        "peak, MiB",
    )
    return (
        f"### {TITLES[measured['table']]}, hidden {setting['hidden']}\n\n{_about(measured)}\n{table(head, lines)}\n"
        f"{_floor(measured)}\n{_eaten(rows)}"
    )


def _about(measured: Measured) -> str:
    """Return what was measured on, where and when."""
    setting = measured["setting"]
    return (
        f"{counted(setting['clients'], 'client')} × {setting['rows']} rows ({measured['tokens']:,} tokens), LoRA r=8 "
        f"on {', '.join(setting['targets'])}, hidden {setting['hidden']}, {setting['layers']} layers, vocabulary "
        f"{setting['vocabulary']}, batch {setting['batch']}, {setting['threads']} threads; {measured['repeats']} timed "
        f"rounds of each way, in turn. {where(measured)}\n"
    )


def _of_bare(row: Measured, rows: Mapping[str, Measured]) -> str:
    return _percent(bare_share(row, rows)) if row["bare"] else ""


def bare_share(row: Measured, rows: Mapping[str, Measured]) -> float:
    """Return the pace of a rival as a share of that of its bare loop."""
    return _median(rows[row["bare"]]) / _median(row)


def _floor(measured: Measured) -> str:
    """Return how the floor comes about."""
    operations, rates = measured["operations"], measured["rates"]
    total = sum(operations.values())
    terms = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in operations.items())
    floors = "; ".join(
        f"{total / rate:.2f} s in {dtype}, at {rate / 1e9:.0f} GFLOP/s measured between the rounds"
        for dtype, rate in rates.items()
    )
    return f"The floor: {total / 1e9:.1f} GFLOP a round without padding ({terms}), which take {floors}.\n"


def _eaten(rows: Mapping[str, Measured]) -> str:
    """Return where the time goes of those rivals that keep less than 90% of their bare loop's pace."""
    slow = [name for name, row in rows.items() if row["bare"] and bare_share(row, rows) < ENOUGH]
    if not any(row["bare"] for row in rows.values()):
        return ""
    if not slow:
        return "Every rival keeps at least 90% of the pace of its bare loop.\n"
    shown = [phase for phase in ways.PHASES if any(phase in rows[name]["phases"] for name in slow)]
    names = list(dict.fromkeys(one for name in slow for one in (name, rows[name]["bare"])))
    lines = [(name, *(f"{rows[name]['phases'].get(phase, 0.0):.2f}" for phase in shown)) for name in names]
    return (
        "Seconds of a round, by what they are spent on, of the rivals that keep less than 90% of the pace of their "
        f"bare loop, and of that loop:\n\n{table(('way', *shown), lines)}"
    )


# Growth, phases, start, GPU -----------------------------------------------------------------------


def growth(measured: Measured) -> str:
    """Return how bellwether's rounds and its memory grow."""
    points = [
        (
            point["axis"],
            f"{point['value']:g}",
            _spread(point["seconds"]),
            f"{point['tokens_per_second']:,.0f}",
            _mebibytes(point["peak"]),
        )
        for point in measured["points"]
    ]
    least = measured["federations"][0]["peak"]
    runs = [
        (f"{run['clients']}", f"{run['cohort']}", _mebibytes(run["peak"]), f"{run['peak'] / least:.2f}")
        for run in measured["federations"]
    ]
    head = ("what grows", "to", "seconds a round (least to most)", "tokens a second", "peak, MiB")
    return (
        f"### Growth\n\nbellwether one by one; all else as in the tables above at hidden 128. {where(measured)}\n\n"
        f"{table(head, points)}\n"
        "Real runs of two rounds on the embedded base, each in a process of its own:\n\n"
        f"{table(('clients', 'in a round', 'peak, MiB', 'times the first'), runs)}"
    )


def survey(measured: Measured) -> str:
    """Return how fast the survey before training is, beside the released way."""
    parts = [f"### Survey\n\n{measured['repeats']} timed turns, in turn. {where(measured)}\n"]
    parts += [_features(one) for one in measured["features"]]
    lines = [
        (
            f"{one['rows']} × {one['features']}",
            _spread(one["tsne"], 3),
            f"{1000 * statistics.median(one['product']):.3f}",
            f"{statistics.median(one['tsne']) / statistics.median(one['product']):,.0f}",
            f"{1000 * one['drawing']:.1f}",
        )
        for one in measured["reduction"]
    ]
    head = (
        "one client's features",
        "t-SNE, s (least to most)",
        "product with the shared projection, ms",
        "times as fast",
        "drawing that projection, once, ms",
    )
    parts.append(table(head, lines))
    lines = [
        (f"{one['rows']:,}", *(_mebibytes(one[key]) for key in ("before", "peak", "features")))
        for one in measured["memory"]
    ]
    head = ("rows of a client", "peak before, MiB", "peak with their features, MiB", "the features, MiB")
    parts.append(table(head, lines))
    clustered = measured["clustering"]
    titles = {
        "seconds": "HDBSCAN of scikit-learn, s",
        "package": "of the hdbscan package, s",
        "agreement": "agreement (adjusted Rand index)",
    }
    known = [key for key in titles if all(key in one for one in clustered)]
    lines = [
        (
            f"{one['points']:,} × {one['dimensions']}",
            *(f"{one[key]:.{4 if key == 'agreement' else 1}f}" for key in known),
        )
        for one in clustered
    ]
    parts.append(table(("points clustered", *(titles[key] for key in known)), lines))
    return "\n".join(parts)


def _features(measured: Measured) -> str:
    """Return the table of the ways to make features at one width."""
    setting, rows = measured["setting"], measured["ways"]
    lines = []
    for dtype in ("float32", "bfloat16"):
        for way in (surveys.RELEASED, surveys.OURS, surveys.MEAN, surveys.BARE):
            row = rows[surveys.named(way, dtype)]
            lines.append(
                (
                    surveys.named(way, dtype),
                    _spread(row["seconds"]),
                    f"{measured['tokens'] / _median(row):,.0f}",
                    f"{surveys.pace(measured, way, dtype, surveys.RELEASED):.2f}",
                    f"{surveys.pace(measured, way, dtype, surveys.RELEASED, 'float32'):.2f}",
                    _percent(surveys.pace(measured, way, dtype, surveys.BARE)),
                    _mebibytes(row["peak"]),
                )
            )
    head = (
        "way",
        "seconds (least to most)",
        "tokens a second",
        "times the released way's pace",
        "in float32",
        "share of the bare forward pass's pace",
        "peak, MiB",
    )
    return (
        f"Features of {measured['rows']} rows ({measured['tokens']:,} tokens), hidden {setting['hidden']}, "
        f"{setting['layers']} layers, vocabulary {setting['vocabulary']}, {setting['threads']} threads:\n\n"
        f"{table(head, lines)}"
    )


def phases(measured: Measured) -> str:
    """Return where the default run's time goes, and what a round does beside forward and backward."""
    run = measured["run"]
    total = sum(run.values())
    lines = [(phase, f"{seconds:.2f}", _percent(seconds / total)) for phase, seconds in run.items()]
    names = list(dict.fromkeys(phase for row in measured["outside"] for phase in row["phases"]))
    outside = [
        (
            f"hidden {row['hidden']}, {row['layers']} layers, batch {row['batch']}",
            *(f"{row['phases'].get(phase, 0.0):.3f}" for phase in names),
            _percent(run_phases.outside(row["phases"])),
        )
        for row in measured["outside"]
    ]
    fields = " ".join(["bellwether run", *measured["fields"]])
    return (
        f"### Where the time goes\n\n`{fields}` in a fresh process, {total:.1f} s. {where(measured)}\n\n"
        f"{table(('phase', 'seconds', 'share'), lines)}\n"
        "Seconds of a round of the tables' setting, one by one:\n\n"
        f"{table(('setting', *names, 'beside forward and backward'), outside)}"
    )


def startup(measured: Measured) -> str:
    """Return how long it takes to start."""
    lines = [
        (f"`{name}`", _spread(row["seconds"], 3), f"{row['imports']:.3f}", f"{row['work']:.3f}")
        for name, row in measured["commands"].items()
    ]
    head = ("command", "seconds (least to most)", "imports, s", "the rest, s")
    return (
        f"### Start\n\nEach in a fresh process, {measured['repeats']} times. {where(measured)}\n\n{table(head, lines)}"
    )


def gpu(measured: Measured) -> str:
    """Return the table of a GPU."""
    setting, rows = measured["setting"], measured["ways"]
    total, rate = sum(measured["operations"].values()), measured["rates"][measured["setting"]["dtype"]]
    slowest = _median(rows["one by one, batch 1"])
    lines = [
        (name, row["failure"], "", "", "", "", "")
        if "failure" in row
        else (
            name,
            _spread(row["seconds"], 3),
            f"{slowest / _median(row):.2f}",
            _percent(total / rate / _median(row)),
            f"{measured['tokens'] / _median(row):,.0f}",
            f"{row['phases'][-1]['tokens']:.0f}" if row["phases"][-1]["tokens"] else "",
            _mebibytes(max(turn["device_peak"] for turn in row["phases"])),
        )
        for name, row in rows.items()
    ]
    head = (
        "way",
        "seconds a round (least to most)",
        "times the pace of one by one at batch 1",
        f"share of the {setting['dtype']} matrix rate",
        "tokens a second",
        "tokens at once",
        "peak on the device, MiB",
    )
    return (
        f"### On {measured['device']}\n\n{_about(measured)}\n{table(head, lines)}\n"
        f"{total / 1e12:.2f} TFLOP a round without padding; matrices are multiplied at {rate / 1e12:.1f} TFLOP/s.\n"
    )


def gemma(measured: Measured) -> str:
    """Return the table of a real model: ways by precision, beside a plain loop and Shepherd's way in the same one."""
    rows, total = measured["ways"], sum(measured["operations"].values())
    lines = []
    for name, row in rows.items():
        dtype = name.rpartition(", ")[2]
        plain, shepherd = (_median(rows[f"{other}, {dtype}"]) for other in ("plain PEFT loop", "Shepherd's way"))
        lines.append(
            (
                name,
                _spread(row["seconds"]),
                f"{measured['tokens'] / _median(row):.0f}",
                f"{plain / _median(row):.2f}",
                f"{shepherd / _median(row):.2f}",
                _percent(total / measured["rates"][dtype] / _median(row)),
                _mebibytes(row["peak"]),
            )
        )
    head = (
        "way",
        "seconds a round (least to most)",
        "tokens a second",
        "times the plain loop's pace",
        "times the pace of Shepherd's way",
        "share of the floor",
        "peak, MiB",
    )
    return (
        f"### A real model: {measured['model']}\n\n{measured['answers']:,} of the tokens are answers. "
        f"{_about(measured)}\n{table(head, lines)}\n{_floor(measured)}"
    )


def generation(measured: Measured) -> str:
    """Return the table of a real model's answers, beside transformers one prompt at a time."""
    rows = measured["ways"]
    plain = rows["generate, one by one"]
    lines = [
        (
            name,
            f"{row['tokens'] / row['seconds']:.1f}",
            f"{row['tokens'] / row['seconds'] / plain['tokens'] * plain['seconds']:.2f}",
            f"{row['equal']} of {measured['prompts']}",
            _mebibytes(row["peak"]),
        )
        for name, row in rows.items()
    ]
    head = ("way", "new tokens a second", "times one by one", "answers equal to one by one", "peak, MiB")
    return (
        f"### Answers of a real model: {measured['model']}\n\n{measured['prompts']} prompts, {measured['new']} new "
        f"tokens each, {measured['dtype']}, {measured['threads']} threads, batches of {measured['batch']}. "
        f"{where(measured)}\n\n{table(head, lines)}"
    )


# Pieces -------------------------------------------------------------------------------------------


def _median(row: Measured) -> float:
    return statistics.median(row["seconds"])


def _spread(seconds: Sequence[float], digits: int = 2) -> str:
    least, most = min(seconds), max(seconds)
    return f"{statistics.median(seconds):.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.1f}%"


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def main() -> None:
    """Render what the results' folder holds."""
    from benchmarks.picture import draw

    results = read(RESULTS)
    draw(results, RESULTS)
    write_block(render(results))
    write_block(choosing.chosen(results), SELECTION)
    write_block(choosing.brief(results), BRIEF)


if __name__ == "__main__":
    main()
