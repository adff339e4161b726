"""A first recipe for a person's own files: what was seen in them, and settings that fit.

    bellwether init clinic-a.jsonl clinic-b.jsonl --model my-model

What is seen is told by ``bellwether.runner.look``. Where no column looks like an instruction or a response, ``???``
stands in the recipe, which does not run before a person has chosen one.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bellwether.data.columns import LONGEST_CLIENT_NAME
from bellwether.data.opening import stem_of
from bellwether.data.rows import Row
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.recipe.file import CHOOSE
from bellwether.runner.checks import embedded_warnings
from bellwether.runner.look import Seen, SeenFile, look
from bellwether.tools.words import counted, cut

# Of the rows, this share is held out for the scores, but no more in all than give a score to about two points: of 400
# answers, of which half are right, a share has a standard error of 2.5 points.
TEST_SHARE, MOST_TEST_ROWS, USUAL_TEST_ROWS = 0.15, 400, 10
# What a recipe may say of tokens per row and per answer; the first that holds nearly all rows whole is taken.
_ROW_SIZES, _ANSWER_SIZES = (128, 256, 512, 1024, 2048, 4096), (32, 64, 128, 256)
_WHOLE = 0.95
_MEASURED = 1000  # rows, evenly taken, whose tokens are counted
_LARGE = 1_000_000_000  # parameters


@dataclass(frozen=True)
class Proposal:
    """A first recipe.

    Args:
        text: the recipe, as YAML with comments.
        warnings: what a person should know before they run it.
        to_choose: the roles that they must choose a column for before.
    """

    text: str
    warnings: Sequence[str]
    to_choose: Sequence[str]


@dataclass(frozen=True)
class _Base:
    """A base model of a person's own.

    Args:
        path: folder, or name on the hub.
        parameters: weights; None of a model that is not here.
        positions: longest sequence in tokens; None where it is not known, or has no limit.
        row_lengths: tokens of rows, prompt and response; empty where they are not known.
        answer_lengths: tokens of their responses.
    """

    path: str
    parameters: int | None = None
    positions: int | None = None
    row_lengths: Sequence[int] = ()
    answer_lengths: Sequence[int] = ()


def propose(
    paths: Sequence[str | Path],
    model: str | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    reading: recipe.Data | None = None,
) -> Proposal:
    """Look at files and return a commented recipe for them.

    Args:
        paths: files or folders, as ``data.sources`` takes them.
        model: folder or hub name of the base; None takes the embedded one.
        columns: by role of ``recipe.Columns``, columns that a person has chosen, as ``look`` takes them.
        reading: how files are read: ``encoding``, ``delimiter`` and ``skip_bad_rows``; None says nothing.

    Raises:
        DataError: a file cannot be read, a row is bad and not to be skipped, or a chosen column is not there.
        ModelError: the model's folder cannot be used.
    """
    if not paths:
        raise DataError("no file is named; give one or more files or folders with rows.")
    seen = look([str(path) for path in paths], columns or {}, reading or recipe.Data())
    base = None if model in (None, "starter") else _opened(str(model), seen)
    clients = len(seen.sizes) or _clients(seen.rows)
    sections = [
        _head(seen),
        _model_section(base),
        _data_section(seen, base),
        _partition_section(seen),
        _federation_section(clients, 20 if base is None else 10),
        _training_sections(base, pairs=any(row.rejected is not None for row in seen.read or ())),
    ]
    warnings = embedded_warnings(seen.read, _embedded_ids) if base is None and seen.read else []
    return Proposal("\n".join(sections), warnings, seen.to_choose)


def _opened(path: str, seen: Seen) -> _Base:
    """Return what is known of a base without its weights; of one that is not here, nothing."""
    from bellwether.data.prompts import resolve_template
    from bellwether.data.tokens import tokenise
    from bellwether.model.base import open_base

    if not Path(path).expanduser().exists() and not path.startswith(("/", ".", "~")):
        return _Base(path)
    opened = open_base(recipe.Model(path=path))
    settings = recipe.Data(max_tokens=_ROW_SIZES[-1], skip_bad_rows=seen.data.skip_bad_rows)
    template = resolve_template(settings, opened.tokenizer)
    tokens = tokenise(_evenly(seen.read or [], _MEASURED), opened.tokenizer, settings, template).rows
    return _Base(
        path,
        opened.facts.parameters,
        opened.facts.max_positions,
        [row.longest for row in tokens],
        [len(row) - row.prompt_length for row in tokens],
    )


def _evenly(rows: Sequence[Row], most: int) -> Sequence[Row]:
    """Return at most so many rows, evenly taken."""
    return rows[:: -(-len(rows) // most)] if rows else rows


def _embedded_ids(texts: Sequence[str]) -> Sequence[Sequence[int]]:
    """Return texts as tokens of the embedded base, without loading what a model takes."""
    from tokenizers import Tokenizer

    from bellwether.model.folder import STARTER

    tokenizer = Tokenizer.from_file(str(STARTER / "tokenizer.json"))
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _clients(rows: int) -> int:
    """Return how many clients to deal rows to: ten, or fewer where each would have under 20 rows."""
    return max(1, min(10, rows // 20))


def _test_rows(sizes: Sequence[int]) -> int:
    """Return how many rows of each category to hold out: about a share of all, but not very many in all.

    Args:
        sizes: rows of each category.
    """
    share = math.ceil(TEST_SHARE * sum(sizes) / len(sizes))
    return max(1, min(share, max(USUAL_TEST_ROWS, MOST_TEST_ROWS // len(sizes))))


def _fitting(lengths: Sequence[int], sizes: Sequence[int]) -> int:
    """Return the first of some sizes that nearly all lengths stay within; else the last one."""
    whole = [size for size in sizes if sum(length <= size for length in lengths) >= _WHOLE * len(lengths)]
    return whole[0] if whole else sizes[-1]


# Writing ------------------------------------------------------------------------------------------


def _shown(text: str, longest: int = LONGEST_CLIENT_NAME) -> str:
    """Return a text that stays on one line of a comment."""
    return _plain(json.dumps(text, ensure_ascii=False)[1:-1], longest)


def _plain(text: str, longest: int) -> str:
    """Return a text without what cannot be shown, cut where it is long."""
    return cut("".join(character if character.isprintable() else "?" for character in text), longest)


def _example(value: Any) -> str:
    """Return a value of a column, cut short."""
    return (
        f'"{_shown(value, 50)}"'
        if isinstance(value, str)
        else _plain(json.dumps(value, ensure_ascii=False, default=str), 50)
    )


def _value(value: object) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").rstrip()


def _name(sources: Sequence[str]) -> str:
    """Return a name for the run: the source's, what the names of several begin with, or all of them."""
    stems = [stem_of(Path(source).absolute()) for source in sources]
    words = [re.split("[-_. ]", stem) for stem in stems]
    same = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*words, strict=False))]
    joined = "-".join(stems)
    if len(stems) == 1 or len("".join(same)) >= 3:
        name = joined if len(stems) == 1 else "-".join(same)
    else:
        name = joined if len(joined) <= 40 else f"{stems[0]}-and-{len(stems) - 1}-more"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:64] or "own-data"


def _head(seen: Seen) -> str:
    files = counted(len(seen.files), "file")
    lines = [
        "# A first recipe for your files. Say where this text is saved in place of RECIPE.",
        "# Run it:                           bellwether run RECIPE",
        "# What each client will hold:       bellwether data RECIPE",
        "# What the run will need:           bellwether plan RECIPE",
        "# Every field with its meaning:     bellwether recipe",
        "#",
    ]
    if seen.to_choose:
        lines += [
            f"# You must choose before it runs: put columns in place of {CHOOSE} under data, or give them to",
            f"# bellwether init: {' '.join(f'--{role} COLUMN' for role in seen.to_choose)}.",
            "# --context and --category likewise, where columns hold these: init then fits the numbers below to them.",
            "#",
        ]
    lines.append(f"# Seen: {counted(seen.rows, 'row')} in {files}.")
    if seen.read:
        instructions = [len(row.instruction) + len(row.context) for row in seen.read]
        responses = [len(row.response) for row in seen.read]
        lines.append(
            f"# Characters, median and longest: instruction with context {statistics.median(instructions):,.0f} and "
            f"{max(instructions):,}, response {statistics.median(responses):,.0f} and {max(responses):,}."
        )
    lines += [f"# {_shown(note, 300)}" for note in seen.notes]
    lines += [f"name: {_value(_name(seen.sources))}", "seed: 0  # every draw derives from it"]
    return "\n".join(lines) + "\n"


def _model_section(base: _Base | None) -> str:
    if base is None:
        return (
            "model:\n  # The small embedded base. Put a model folder or a name on the Hugging Face hub here, or\n"
            "  # give it to bellwether init --model, which fits the other settings to it.\n  path: starter\n"
        )
    lines = ["model:", f"  path: {_value(base.path)}"]
    if base.parameters is None:
        lines.append("  # Nothing here is fitted to it, since it is a name on the hub; bellwether plan downloads it.")
    else:
        limit = "" if base.positions is None else f", {counted(base.positions, 'position')}"
        lines.append(f"  # {counted(base.parameters, 'parameter')}{limit}.")
    if base.parameters is None or base.parameters >= _LARGE:
        lines.append("  dtype: bfloat16  # half the memory of float32; adapters stay float32")
    else:
        lines.append("  dtype: float32  # bfloat16 takes half the memory for the base")
    return "\n".join(lines) + "\n"


def _columns_comment(seen: Seen) -> list[str]:
    """Return lines that show the columns of all files, once for files that have the same."""
    alike: dict[tuple[str, ...], list[SeenFile]] = collections.defaultdict(list)
    for file in seen.files:
        alike[tuple(file.columns)].append(file)
    lines = []
    for names, files in list(alike.items())[:10]:
        more = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
        lines.append(f"  # Columns of {_shown(files[0].name)}{more}, how many rows fill them, and a value:")
        width = min(30, max(map(len, map(_shown, names)), default=0))
        for name in names[:40]:
            filled = sum(file.columns[name].filled for file in files)
            example = next((file.columns[name].example for file in files if file.columns[name].filled), None)
            lines.append(f"  #   {_shown(name):<{width}}  {filled:>7,}  {_example(example)}")
        lines += [f"  #   and {len(names) - 40:,} more"] if len(names) > 40 else []
    return lines + ([f"  # and other columns in {len(alike) - 10:,} more kinds of file"] if len(alike) > 10 else [])


def _columns_lines(seen: Seen) -> list[str]:
    """Return the fields that name columns; none where all are called as usual."""
    if not any(file.mapping for file in seen.files):
        return []
    say = f"choose: put a column in place of {CHOOSE}, '' is none" if seen.to_choose else "check what they are"
    section = seen.columns
    if not section.source_columns:
        return [f"  columns:  # {say}", *_mapping_lines(seen.files[0], " " * 4)]
    lines = [f"  source_columns:  # {say}"]
    for file in seen.files:
        if file.mapping:
            lines.append(f"    - source: {_value(file.name)}")
            lines += _mapping_lines(file, " " * 6)
    return lines


def _mapping_lines(file: SeenFile, indent: str) -> list[str]:
    """Return the columns of a file by role; where some are to be chosen, also what may be named beside them."""
    lines = [f"{indent}{role}: {_column(column)}" for role, column in file.mapping.items()]
    if CHOOSE in file.mapping.values():
        beside = [role for role in ("context", "category") if file.column_of(role) is None and role not in file.mapping]
        lines += [f"{indent}# {role}: a column, where one holds it" for role in beside]
    return lines


def _column(column: str) -> str:
    """Return a column as YAML; the mark of one that is to be chosen stands as it is."""
    return CHOOSE if column == CHOOSE else _value(column)


def _data_section(seen: Seen, base: _Base | None) -> str:
    lines = ["data:", "  sources:", *(f"    - {_value(source)}" for source in seen.sources)]
    lines += [*_reading_lines(seen), *_columns_comment(seen), *_columns_lines(seen)]
    if seen.categories:
        largest = sorted(seen.categories.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{_shown(name, 40)} ({rows:,})" for name, rows in largest[:12])
        more = f" and {len(largest) - 12:,} more" if len(largest) > 12 else ""
        several = counted(len(largest), "category", "categories")
        lines.append(f"  # {several} with {'their' if len(largest) > 1 else 'its'} rows: {shown}{more}.")
    else:
        yet = " yet" if seen.to_choose else ""
        lines.append(f"  # No column names a category{yet}, so all rows count as one.")
    lines += [*_held_out_lines(seen), *_max_tokens_lines(base)]
    return "\n".join(lines) + "\n"


def _reading_lines(seen: Seen) -> list[str]:
    """Return the fields that say how files are read, where a person has chosen it."""
    lines = [
        f"  {field}: {_value(value)}" for field in ("encoding", "delimiter") if (value := getattr(seen.data, field))
    ]
    if seen.data.skip_bad_rows:
        unchecked = "; what rows hold is not checked before columns are chosen" if seen.read is None else ""
        lines.append(f"  skip_bad_rows: true  # bad and left out: {counted(seen.bad, 'row')}{unchecked}")
    return lines


def _held_out_lines(seen: Seen) -> list[str]:
    """Return the lines on rows that are held out for the scores, and why so many."""
    if seen.held_out:
        return [f"  # Held out for the scores: {', '.join(_shown(name) for name in seen.held_out)}."]
    if seen.to_choose and not seen.categories:
        usual = recipe.Data().test_rows_per_category
        return [
            f"  # Of each category {counted(usual, 'row')} are held out for the scores, at most half of it;",
            "  # test_rows_per_category says how many. Columns that are given to bellwether init, the category's too,",
            "  # get a number that fits.",
        ]
    rest = seen.rows - sum(seen.categories.values())
    sizes = [*seen.categories.values(), *([rest] if rest else [])]
    wanted = _test_rows(sizes)
    taken = sum(min(wanted, size // 2) for size in sizes)
    return [
        f"  # Held out of training for the scores: {counted(taken, 'row')} of {seen.rows:,} ({taken / seen.rows:.0%}). "
        f"About {TEST_SHARE:.0%} are taken, but at",
        f"  # most half of a category, and {MOST_TEST_ROWS} in all, which tell a share of right answers to two or",
        f"  # three points, or {USUAL_TEST_ROWS} of each category.",
        f"  test_rows_per_category: {wanted}",
    ]


def _max_tokens_lines(base: _Base | None) -> list[str]:
    """Return the lines on the longest row."""
    if base is None or not base.row_lengths:
        most = min(512, (base and base.positions) or 512)
        return [
            f"  max_tokens: {most}  # longer rows lose the end of their context first; `bellwether data` counts them"
        ]
    most = base.positions or _ROW_SIZES[-1]
    sizes = [size for size in _ROW_SIZES if size < most] + [min(most, _ROW_SIZES[-1])]
    chosen = _fitting(base.row_lengths, sizes)
    whole = sum(length <= chosen for length in base.row_lengths) / len(base.row_lengths)
    longest = max(base.row_lengths)
    more = " or more" if longest == _ROW_SIZES[-1] else ""
    lengths = f"median {statistics.median(base.row_lengths):,.0f}, longest {longest:,}{more}"
    return [
        f"  # Tokens per row in this model's prompt: {lengths}; {whole:.0%} have at most so many. Longer ones lose the",
        "  # end of their context first, then of their response; `bellwether data` counts them.",
        f"  max_tokens: {chosen}",
    ]


def _partition_section(seen: Seen) -> str:
    lines = ["partition:"]
    for column, count in list(seen.client_columns.items())[:5]:
        lines.append(
            f"  # The column {_shown(column)} could name {counted(count, 'client')}. To take it, put `method: column` "
            f"and `column: {_shown(column)}` here in place of the lines of this section."
        )
    if not seen.sizes and len(seen.groups) > 1:
        shown = ", ".join(f"{_shown(name, 40)} ({rows:,})" for name, rows in seen.groups.most_common(12))
        lines.append(
            f"  # Rows are of {len(seen.groups)} groups: {shown}. To give each clients of its own, say how many in "
            "clients_per_group, and their sum in clients."
        )
    if seen.sizes:
        lines += [
            f"  # Each file is a client; the smallest has {counted(min(seen.sizes.values()), 'row')}, the largest "
            f"{max(seen.sizes.values()):,}.",
            "  method: files",
        ]
    elif len(seen.categories) > 1:
        lines += [
            "  # Rows are dealt by category, unevenly; a smaller alpha is more uneven, method iid is even.",
            "  method: dirichlet",
            "  alpha: 0.5",
            f"  clients: {_clients(seen.rows)}",
        ]
    else:
        lines += ["  method: iid  # without categories, rows are dealt evenly", f"  clients: {_clients(seen.rows)}"]
    return "\n".join(lines) + "\n"


def _federation_section(clients: int, rounds: int) -> str:
    fraction = 1.0 if clients <= 4 else 0.5 if clients <= 20 else 0.1
    taken = max(1, round(fraction * clients))
    lines = [
        "federation:",
        f"  rounds: {rounds}",
        f"  fraction: {fraction}  # {taken} of {counted(clients, 'client')} in each round",
    ]
    return "\n".join(lines) + "\n"


def _training_sections(base: _Base | None, *, pairs: bool) -> str:
    loss = ["  loss: dpo  # rows have a chosen and a rejected answer", "  beta: 0.1  # holds the model to the base"]
    loss = loss if pairs else []
    if base is None:
        rate = recipe.Training().learning_rate
        rates = f"  learning_rate: {rate}  # suits the small embedded base; 3.0e-4 is usual for others"
        return "\n".join(["lora:", "  rank: 8", "training:", *loss, rates]) + "\n"
    large = base.parameters is None or base.parameters >= _LARGE
    lines = [
        "lora:",
        "  rank: 8  # rows of A and columns of B; more learns more and sends more",
        "  alpha: 16",
        "training:",
        *loss,
        "  learning_rate: 3.0e-4  # usual for AdamW over a frozen base; try 1.0e-4 and 1.0e-3 on validation rows",
        f"  batch_size: {2 if large else 8}  # rows at once; with accumulation, 8 rows in an optimizer step",
        f"  accumulation: {4 if large else 1}",
        f"  gradient_checkpointing: {str(large).lower()}  # less memory, more time",
    ]
    if base.answer_lengths:
        new = _fitting(base.answer_lengths, _ANSWER_SIZES)
        lines += ["evaluation:", f"  max_new_tokens: {new}  # tokens generated per answer; responses have "
                  f"{statistics.median(base.answer_lengths):,.0f} at the median"]  # fmt: skip
    return "\n".join(lines) + "\n"
