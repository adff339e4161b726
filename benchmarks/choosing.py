"""What choosing rows is worth, as tables: on tasks that nobody trained on, and of a coreset before any training."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.markdown import Measured, table, where

# Titles of the short table's columns, by the name of a recipe.
UNSEEN = {
    "starter": "embedded world",
    "dolly-05": "Dolly, Dirichlet 0.5",
    "dolly-50": "Dolly, Dirichlet 5.0",
    "natural-instructions": "tasks of Natural Instructions",
}


def unseen(measured: Measured) -> str:
    """Return the table of arms that choose rows, on tasks that nobody trained on."""
    head = (
        "arm",
        "loss",
        "minus random rows",
        "ROUGE-L, %",
        "minus random rows",
        "exact, %",
        "loss on seen categories",
        "loss on training rows",
        "rows used, %",
        "rows trained",
        "tokens trained",
        "surveys, s",
        "training, s",
    )
    lines = [(name, *_cells(arm, measured["training_loss"][name])) for name, arm in measured["arms"].items()]
    return f"### Unseen tasks: {measured['name']}\n\n{_about(measured)}\n\n{table(head, lines)}"


def _cells(arm: Measured, training_loss: float) -> tuple[str, ...]:
    """Return an arm's figures."""
    costs, scores, gaps = arm["costs"], arm["scores"], arm["gaps"]
    return (
        _interval(scores["loss"], 1),
        _gap(gaps.get("loss"), 1),
        _interval(scores.get("rouge_l"), 100),
        _gap(gaps.get("rouge_l"), 100),
        _number(100 * scores["exact"]["mean"] if "exact" in scores else None, 1),
        _number(arm["seen_loss"], 3),
        _number(training_loss, 3),
        _number(_used(arm), 1),
        _number(costs["rows_seen"], 0),
        _number(costs["tokens"], 0),
        _number(costs["survey_seconds"], 0),
        _number(costs["seconds"], 0),
    )


def _about(measured: Measured) -> str:
    """Return what was scored, which arm each was compared with, and where."""
    against = {name: arm["against"] for name, arm in measured["arms"].items() if arm["against"]}
    usual = measured["against"]
    twins = [f"{name} with {other}" for name, other in against.items() if other != usual]
    compared = f"{', '.join(twins)}, others with {usual}" if twins else f"all with {usual}"
    jobs = measured["jobs"]
    return (
        f"{measured['prompts']} rows ({', '.join(measured['strata'])}) of the part {measured['part']}, seeds "
        f"{', '.join(map(str, measured['seeds']))}; 95% intervals over seeds and rows of these categories. Compared: "
        f"{compared}; * where p < 0.05 after Holm's correction over the arms. Seconds are of "
        f"{f'{jobs} runs side by side' if jobs > 1 else 'one run at a time'}. {where(measured)}"
    )


def chosen(results: Mapping[str, Measured]) -> str:
    """Return what choosing rows is worth in short: the loss on unseen tasks by data, and more local epochs."""
    found = {title: results[f"unseen-{name}"] for name, title in UNSEEN.items() if f"unseen-{name}" in results}
    arms = dict.fromkeys(arm for one in found.values() for arm in one["arms"])
    lines = [(arm, *(_short(one["arms"].get(arm), one["arms"].get("full")) for one in found.values())) for arm in arms]
    parts = [table(("loss on what nobody trained on", *found), lines)] if found else []
    epochs = results.get("unseen-epochs")
    if epochs is not None:
        lines = [
            (arm, _number(epochs["training_loss"][arm], 3), _interval(one["scores"]["loss"], 1), _rouge(one))
            for arm, one in epochs["arms"].items()
        ]
        parts.append(table(("arm", "loss on training rows", "loss on unseen categories", "their ROUGE-L, %"), lines))
    return "\n" + "\n".join(parts) + "\n"


def brief(results: Mapping[str, Measured]) -> str:
    """Return the few figures of choosing rows that the README's plot is drawn from."""
    arms = results["unseen-starter"]["arms"]
    shown = {
        "base, untuned": "base",
        "all rows": "full",
        "all rows, as few steps as below": "full, few steps",
        "rows chosen as by FedHDS": "hierarchical",
        "as many random rows": "random",
    }
    lines = [
        (
            title,
            _interval(arms[name]["scores"]["loss"], 1),
            _interval(arms[name]["scores"]["rouge_l"], 100),
            _number(arms[name]["costs"]["rows_seen"], 0),
        )
        for title, name in shown.items()
    ]
    return f"\n{table(('on categories that nobody trained on', 'loss', 'ROUGE-L, %', 'rows trained'), lines)}\n"


def _short(arm: Measured | None, full: Measured | None) -> str:
    """Return an arm's loss and ROUGE-L, the share it trained of the rows that all make, and the share it used."""
    if arm is None:
        return ""
    rouge = f", ROUGE-L {_rouge(arm)}" if "rouge_l" in arm["scores"] else ""
    rows, of_all, used = arm["costs"]["rows_seen"], full["costs"]["rows_seen"] if full else None, _used(arm)
    loss = _interval(arm["scores"]["loss"], 1) + rouge
    return loss + (f", {100 * rows / of_all:.0f}% trained, {used:.0f}% used" if rows is not None and of_all else "")


def coreset(measured: Measured) -> str:
    """Return the table of a coreset before training, by setting."""
    head = (
        "clients",
        "space",
        "`min_cluster_rows`",
        "centroids sent",
        "in a group of several, %",
        "ARI",
        "NMI",
        "rows chosen",
        "of another topic than their cluster, %",
        "topics covered, %",
        "by as many random rows, %",
    )
    lines = [
        (
            one["clients"],
            one["space"],
            str(one["min_cluster_rows"]),
            _spread(one["centroids"], 1, 0),
            _spread(one["grouped"], 100, 0),
            _spread(one["ari"], 1, 2),
            _spread(one["nmi"], 1, 2),
            _spread(one["rows"], 1, 0),
            _spread(one["wrong topic"], 100, 0),
            _spread(one["topics"], 100, 0),
            _spread(one["topics of random rows"], 100, 0),
        )
        for one in measured["settings"]
    ]
    about = (
        f"Means over the seeds {', '.join(map(str, measured['seeds']))}, with the least and the most. {where(measured)}"
    )
    return f"### A coreset before any training\n\n{about}\n\n{table(head, lines)}"


def _spread(values: list[float | None], scale: float, digits: int) -> str:
    """Return mean, least and most of what could be measured; a dash where nothing could."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    mean, least, most = (f"{value:.{digits}f}" for value in (sum(known) / len(known), min(known), max(known)))
    return mean if least == most else f"{mean} ({least} to {most})"


def _used(arm: Measured) -> float | None:
    """Return the share of all rows that an arm trained on at least once, in percent; None where it trains none."""
    costs = arm["costs"]
    return 100 * costs["rows"] / costs["rows_of_all"] if costs["rows"] is not None else None


def _rouge(arm: Measured) -> str:
    return f"{100 * arm['scores']['rouge_l']['mean']:.1f}"


def _gap(found: Measured | None, scale: float) -> str:
    """Return a difference and its interval, with a star where it is beyond chance; nothing where there is none."""
    return _interval(found, scale) + ("*" if found and found["p"] < 0.05 else "")


def _interval(found: Measured | None, scale: float) -> str:
    """Return a mean and its interval; nothing where there is none."""
    if found is None:
        return ""
    digits = 1 if scale > 1 else 3
    mean, low, high = (f"{found[key] * scale:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
