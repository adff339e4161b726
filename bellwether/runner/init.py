"""A first recipe for a person's own files: what was seen in them, and settings that fit.

bellwether init clinic-a.jsonl clinic-b.jsonl > recipe.yaml
"""

from __future__ import annotations

import collections
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from bellwether.data.columns import LONGEST_CLIENT_NAME, USUAL_NAMES, check_client_name
from bellwether.data.files import Problems, read_records
from bellwether.data.rows import Row
from bellwether.data.sources import list_files, read_rows
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.tools.words import listed

# Names that people give to columns beside the usual ones, which need no mapping.
_OTHER_NAMES = {
    "instruction": ("query", "task", "user", "ask"),
    "context": ("passage", "text", "document", "background"),
    "response": ("completion", "target", "reply", "assistant", "label"),
    "category": ("type", "topic", "label", "class", "task"),
    "messages": ("chat", "dialog", "dialogue", "conversation", "turns"),
    "group": ("lang",),
}
_MOST_CLIENTS = 1000


@dataclass(frozen=True)
class _Seen:
    """What the files hold.

    Args:
        sources: the paths as given.
        files: how many files there are.
        columns: how many of the rows fill each column.
        mapping: columns that must be named in the recipe, by role.
        rows: all rows.
        notes: what reading them had to say.
        client_columns: columns that may name clients, with how many clients.
    """

    sources: Sequence[str]
    files: int
    columns: Mapping[str, int]
    mapping: Mapping[str, str]
    rows: Sequence[Row]
    notes: Sequence[str]
    client_columns: Mapping[str, int]


def propose(paths: Sequence[str | Path]) -> str:
    """Look at files and return a commented recipe for them, in YAML.

    Args:
        paths: files or folders, as ``data.sources`` takes them.

    Raises:
        DataError: a file cannot be read, a row is bad, or no column looks like an instruction.
    """
    if not paths:
        raise DataError("no file is named; give one or more files or folders with rows.")
    seen = _look([str(path) for path in paths])
    several = len({row.client for row in seen.rows}) > 1
    categories = collections.Counter(row.category for row in seen.rows if row.category)
    sections = [
        _head(seen),
        _data_section(seen, categories),
        _partition_section(seen, several, categories),
        _federation_section(len({row.client for row in seen.rows}) if several else _clients(seen.rows)),
        _closing(),
    ]
    return "\n".join(sections)


def _look(sources: list[str]) -> _Seen:
    problems = Problems()
    files = [path for source in sources for path in list_files(Path(source).expanduser(), [])]
    records = [record.values for path in files for record in read_records(path, path.name, problems)]
    problems.check()
    filled = collections.Counter(key for values in records for key, value in values.items() if value not in (None, ""))
    columns = {key: filled[key] for key in dict.fromkeys(key for values in records for key in values)}
    mapping = _mapping(list(columns))
    rows, notes = read_rows(sources, recipe.Data(sources=tuple(sources), columns=recipe.Columns(**mapping)))
    used = {name for names in USUAL_NAMES.values() for name in names} | set(mapping.values())
    return _Seen(
        sources,
        len(files),
        columns,
        mapping,
        rows,
        notes,
        {
            column: count
            for column in columns
            if column not in used and (count := _distinct([values.get(column) for values in records]))
        },
    )


def _mapping(columns: Sequence[str]) -> dict[str, str]:
    """Return which columns must be named, since they are called otherwise than usual."""
    lowered = {column.lower().strip(): column for column in reversed(columns)}
    found: dict[str, str] = {}
    for role, usual in USUAL_NAMES.items():
        if any(name in columns for name in usual):
            continue
        for name in (*usual, *_OTHER_NAMES[role]):
            if name in lowered and lowered[name] not in found.values():
                found[role] = lowered[name]
                break
    has = {role for role, usual in USUAL_NAMES.items() if role in found or any(name in columns for name in usual)}
    if {"instruction", "response"} <= has:
        found.pop("messages", None)
    elif "messages" in has:
        found = {role: column for role, column in found.items() if role in ("messages", "category", "group")}
    else:
        raise DataError(
            f"no columns look like an instruction and a response (there are {listed(columns)}); "
            "write a recipe with data.columns.instruction and data.columns.response, "
            "or data.columns.messages for chats."
        )
    return found


def _distinct(values: Sequence[object]) -> int:
    """Return how many clients a column would name; 0 where it is no column for that."""
    if not all(isinstance(value, (str, int)) and not isinstance(value, bool) for value in values):
        return 0
    names = {str(value).strip() for value in values}
    if not 2 <= len(names) <= min(_MOST_CLIENTS, len(values) // 5):
        return 0
    try:
        for name in names:
            check_client_name(name)
    except DataError:
        return 0
    return len(names)


def _clients(rows: Sequence[Row]) -> int:
    """Return how many clients to deal rows to: ten, or fewer where each would have under 20 rows."""
    return max(1, min(10, len(rows) // 20))


# Writing ------------------------------------------------------------------------------------------


def _shown(text: str, longest: int = LONGEST_CLIENT_NAME) -> str:
    """Return a text that stays on one line of a comment."""
    quoted = json.dumps(text, ensure_ascii=False)[1:-1]
    safe = "".join(character if character.isprintable() else "?" for character in quoted)
    return safe if len(safe) <= longest else f"{safe[: longest - 1]}…"


def _value(value: object) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").rstrip()


def _name(sources: Sequence[str]) -> str:
    """Return a name for the run after the first source."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(sources[0]).absolute().stem).strip("-._")[:64]
    return stem or "own-data"


def _head(seen: _Seen) -> str:
    instructions = [len(row.instruction) + len(row.context) for row in seen.rows]
    responses = [len(row.response) for row in seen.rows]
    lines = [
        "# A first recipe for your files. Say where this text is saved in place of RECIPE.",
        "# Run it:                           bellwether run RECIPE",
        "# What each client will hold:       bellwether data RECIPE",
        "# What the run will need:           bellwether plan RECIPE",
        "# Every field with its meaning:     bellwether recipe",
        "#",
        f"# Seen: {len(seen.rows):,} rows in {seen.files:,} file(s).",
        f"# Characters, median and longest: instruction with context {statistics.median(instructions):,.0f} and "
        f"{max(instructions):,}, response {statistics.median(responses):,.0f} and {max(responses):,}.",
        "# Columns, and how many rows fill them: "
        + ", ".join(f"{_shown(column)} ({filled:,})" for column, filled in seen.columns.items())
        + ".",
        *(f"# {_shown(note, 300)}" for note in seen.notes),
        f"name: {_value(_name(seen.sources))}",
        "seed: 0  # every draw derives from it",
        "",
        "model:",
        "  path: starter  # the small embedded base; put a model folder or a name on the Hugging Face hub here",
    ]
    return "\n".join(lines) + "\n"


def _data_section(seen: _Seen, categories: Mapping[str, int]) -> str:
    lines = ["data:", "  sources:", *(f"    - {_value(source)}" for source in seen.sources)]
    if seen.mapping:
        lines += ["  columns:  # these are called otherwise than usual; check that they are what they seem"]
        lines += [f"    {role}: {_value(column)}" for role, column in seen.mapping.items()]
    if categories:
        largest = sorted(categories.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{_shown(name, 40)} ({rows:,})" for name, rows in largest[:12])
        more = f" and {len(largest) - 12} more" if len(largest) > 12 else ""
        lines.append(f"  # {len(largest)} categories with their rows: {shown}{more}.")
    else:
        lines.append("  # No column names a category, so all rows count as one.")
    smallest = min(categories.values(), default=len(seen.rows))
    held_out = max(1, min(10, smallest // 5))
    lines += [
        f"  test_rows_per_category: {held_out}  # held out of training for the scores",
        "  max_tokens: 512  # longer rows lose the end of their context first; `bellwether data` counts them",
    ]
    return "\n".join(lines) + "\n"


def _partition_section(seen: _Seen, several: bool, categories: Mapping[str, int]) -> str:
    lines = ["partition:"]
    for column, count in list(seen.client_columns.items())[:5]:
        lines.append(
            f"  # The column {_shown(column)} could name {count} clients. To take it, put `method: column` and "
            f"`column: {_shown(column)}` here in place of the lines of this section."
        )
    clients = _clients(seen.rows)
    groups = collections.Counter(row.group for row in seen.rows if row.group)
    if not several and len(groups) > 1:
        shown = ", ".join(f"{_shown(name, 40)} ({rows:,})" for name, rows in groups.most_common(12))
        lines.append(
            f"  # Rows are of {len(groups)} groups: {shown}. To give each clients of its own, say how many in "
            "clients_per_group, and their sum in clients."
        )
    if several:
        sizes = collections.Counter(row.client for row in seen.rows)
        lines += [
            f"  # Each file is a client; the smallest has {min(sizes.values()):,} rows, the largest "
            f"{max(sizes.values()):,}.",
            "  method: files",
        ]
    elif len(categories) > 1:
        lines += [
            "  # Rows are dealt by category, unevenly; a smaller alpha is more uneven, method iid is even.",
            "  method: dirichlet",
            "  alpha: 0.5",
            f"  clients: {clients}",
        ]
    else:
        lines += ["  method: iid  # without categories, rows are dealt evenly", f"  clients: {clients}"]
    return "\n".join(lines) + "\n"


def _federation_section(clients: int) -> str:
    fraction = 1.0 if clients <= 4 else 0.5 if clients <= 20 else 0.1
    taken = max(1, round(fraction * clients))
    lines = [
        "federation:",
        "  rounds: 20",
        f"  fraction: {fraction}  # of {clients} clients, {taken} take part in a round",
    ]
    return "\n".join(lines) + "\n"


def _closing() -> str:
    lines = [
        "lora:",
        "  rank: 8",
        "training:",
        f"  learning_rate: {recipe.Training().learning_rate}  # suits the small embedded base; "
        "3.0e-4 is usual for models of a billion parameters",
    ]
    return "\n".join(lines) + "\n"
