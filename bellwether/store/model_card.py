"""The model card that lies beside a tuned adapter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from bellwether.exchange.records import EvaluationRecord, Record, RoundRecord
from bellwether.exchange.scores import Scores, Totals, macro, means
from bellwether.recipe.file import dump_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.tools.words import clean, counted

_CARD = """---
base_model: {base_quoted}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- federated-learning
- instruction-tuning
---

# {name}

A LoRA adapter (rank {rank}, alpha {alpha}) for `{base}`, tuned on instructions by {clients} in a {kind}
of bellwether: the base model stayed frozen, every client trained on its own rows, and a server aggregated
their adapters ({aggregate}) over {rounds}.

## How to load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
{base_import}
base = AutoModelForCausalLM.from_pretrained({base_argument})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

## Data

{data}

## Scores

{scores}

## What this does and does not protect

In a federation the text of a client's rows stays at its site; only {what} travel. That is no guarantee of
privacy: an adapter can still reveal some of the text it was trained on, and no noise was added to hide it. Answers can
be wrong or harmful wherever those of the base model can; the scores above hold for the rows they were measured on.

## Recipe

Seed {seed}; {environment}.

```yaml
{recipe}```
"""


def model_card(
    recipe: Recipe, records: Iterable[Record], clients: int, environment: Mapping[str, Any], *, sites: bool = False
) -> str:
    """Return the card in Markdown, with the header that model hubs read.

    Args:
        recipe: the resolved recipe of the run.
        records: its records.
        clients: number of clients in the federation.
        environment: see ``bellwether.store.run_folder.describe_environment``.
        sites: whether the clients are sites of a real federation, whose sources are their own.
    """
    kept = tuple(records)
    embedded, quoted = recipe.model.path == "starter", json.dumps(recipe.model.path, ensure_ascii=False)
    return _CARD.format(
        base=_code(recipe.model.path),
        base_quoted=quoted,
        base_import="\nfrom bellwether.model.folder import STARTER\n" if embedded else "",
        base_argument="STARTER" if embedded else quoted,
        name=recipe.name,
        rank=recipe.lora.rank,
        alpha=f"{recipe.lora.alpha:g}",
        clients=counted(clients, "site" if sites else "client"),
        kind="federation" if sites else "simulated federation",
        aggregate=_code(recipe.method.name),
        rounds=counted(recipe.federation.rounds, "round"),
        what=("masked " if recipe.secure_aggregation.enabled else "")
        + "adapters with what the method adds to them"
        + (", centroids of clusters of rows and totals" if recipe.selection.surveys else " and totals"),
        data=_data(recipe, kept, sites),
        scores=_scores([record for record in kept if isinstance(record, EvaluationRecord)]),
        seed=recipe.seed,
        environment=_environment(environment),
        recipe=dump_recipe(recipe).replace("```", "` ` `"),
    )


def _data(recipe: Recipe, records: tuple[Record, ...], sites: bool) -> str:
    """Return what it was trained and scored on."""
    sources = ", ".join(f"`{_code(source)}`" for source in recipe.data.sources)
    lines = ["Every site trained on rows of its own." if sites else f"Sources: {sources}."]
    rounds = [record for record in records if isinstance(record, RoundRecord)]
    if rounds:
        clients = {part.client for record in rounds for part in record.clients}
        rows, tokens = sum(record.rows_seen for record in rounds), sum(record.tokens for record in rounds)
        lines.append(
            f"Over all rounds, {counted(len(clients), 'site' if sites else 'different client')} took part and trained "
            f"on {counted(rows, 'row')} and {counted(tokens, 'token')}; a row counts each time it was trained on."
        )
    return "\n".join(lines)


def _scores(evaluations: list[EvaluationRecord]) -> str:
    """Return a table of base against final scores for every part that was scored."""
    tables = []
    for part in dict.fromkeys(record.part for record in evaluations):
        scored = [record for record in evaluations if record.part == part]
        tables.append(_table(scored[0], scored[-1]))
        if scored[-1].groups:
            tables.append(_group_table(scored[0], scored[-1]))
    note = (
        "Loss is in nats per response token, ROUGE-L (F1, with stemming) and exact match in percent; "
        "each cell is untuned base → this adapter. The mean weighs every category alike."
    )
    if any(totals.pairs for record in evaluations for totals in record.categories.values()):
        note += (
            " Preferred is the share of preference rows, in percent, whose chosen answer has gained more "
            "log-probability over the untuned base than the rejected one; the base itself stands at chance."
        )
    return "\n\n".join([*tables, note]) if tables else "It was not scored: no rows were held out."


def _table(base: EvaluationRecord, final: EvaluationRecord) -> str:
    """Return one table in Markdown."""
    mean = ("**mean of categories**", macro(base.categories), macro(final.categories))
    title = f"Part `{_code(final.part)}`, after round {final.round}:"
    return _lines(title, "category", [mean, *_rows(base.categories, final.categories)])


def _group_table(base: EvaluationRecord, final: EvaluationRecord) -> str:
    """Return the table of scores by group in Markdown."""
    title = f"Part `{_code(final.part)}` by group, means over all rows of each, after round {final.round}:"
    return _lines(title, "group", _rows(base.groups, final.groups))


def _rows(base: Mapping[str, Totals], final: Mapping[str, Totals]) -> list[tuple[str, Scores, Scores]]:
    """Return label, scores before and scores after of every name."""
    names = sorted({*base, *final})
    return [(_cell(name), means(base.get(name, Totals())), means(final.get(name, Totals()))) for name in names]


def _lines(title: str, first: str, rows: Iterable[tuple[str, Scores, Scores]]) -> str:
    """Return a table of scores in Markdown."""
    rows = list(rows)
    paired = any(after.preferred is not None for _, _, after in rows)
    names = ["rows", "loss", "ROUGE-L", "exact match", *(["preferred"] if paired else [])]
    head = [title, "", f"| {' | '.join([first, *names])} |", f"| --- | {' | '.join('---:' for _ in names)} |"]
    return "\n".join(
        [*head, *(f"| {label} | {after.rows} | {_changes(before, after, paired)} |" for label, before, after in rows)]
    )


def _changes(before: Scores, after: Scores, paired: bool) -> str:
    """Return the cells with scores."""

    def cell(old: float | None, new: float | None, factor: int, digits: int) -> str:
        old_text, new_text = ("–" if value is None else f"{factor * value:.{digits}f}" for value in (old, new))
        return f"{old_text} → {new_text}"

    return " | ".join(
        (
            cell(before.loss, after.loss, 1, 3),
            cell(before.rouge_l, after.rouge_l, 100, 1),
            cell(before.exact, after.exact, 100, 1),
            *([cell(before.preferred, after.preferred, 100, 1)] if paired else []),
        )
    )


def _environment(environment: Mapping[str, Any]) -> str:
    """Return versions and device in one line."""
    versions = environment.get("versions")
    known = {name: version for name, version in (versions if isinstance(versions, dict) else {}).items() if version}
    facts = [f"{name} {version}" for name, version in known.items()]
    facts += [f"{key} {environment[key]}" for key in ("device", "threads", "dtype") if environment.get(key) is not None]
    return ", ".join(facts) or "environment unknown"


def _code(text: str) -> str:
    """Return a text that fits between single backticks."""
    return " ".join(clean(text).replace("`", "'").split())


def _cell(text: str) -> str:
    """Return a text that is shown as it is in a cell of a Markdown table."""
    escaped = "".join(f"\\{mark}" if mark in "\\`*_{}[]<>()#+-!|" else mark for mark in clean(text))
    return " ".join(escaped.split())
