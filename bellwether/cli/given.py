"""From the words of a command line to a recipe, whose code its person agrees to before anything of it is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bellwether.cli.options import CLEARED
from bellwether.cli.say import complain, printable
from bellwether.errors import CheckpointError, FederationError, RecipeError
from bellwether.tools.words import counted

if TYPE_CHECKING:
    from bellwether.recipe.consent import Code
    from bellwether.recipe.recipe import Recipe

# A rate that suits pretrained models of usual size; the default recipe's suits the embedded base only.
USUAL_RATE = 3e-4
OWN_TABLE = "own-table"


def given_recipe(
    words: list[str] | None, flags: list[str], default: str = "default", own: str | None = None, *, arms: bool = False
) -> Recipe:
    """Return the recipe that the command line describes, or a default; flags win over fields, fields over it.

    Args:
        words: recipe and fields.
        flags: fields that flags set.
        default: the recipe to take where none is named.
        own: the one to take for rows of one's own, where none is named; None has none.
        arms: whether the arms of its comparison are meant, too.

    Raises:
        RecipeError: there is no such recipe, or it cannot stand.
    """
    from bellwether.recipe.file import find_recipe, load_recipe

    fields = [word for word in words or [] if "=" in word]
    flags = _without_what_fields_set(flags, fields)
    file, own_rows = _file(words or []), not _only_embedded([*fields, *flags])
    if file is None and own is not None:
        file = own if own_rows else default
    if file is not None:
        recipe = load_recipe(find_recipe(file), [*fields, *flags])
        _tell_foreign_rates(file, recipe, [*fields, *flags], arms)
        return recipe
    models = [word.partition("=")[2].strip("\"'") for word in [*fields, *flags] if word.startswith("model.path=")]
    other_model = models[-1:] not in ([], ["starter"])
    if other_model and not any(word.startswith("training.learning_rate=") for word in fields):
        complain(
            f"training.learning_rate is {USUAL_RATE:g}, since the default recipe's suits the embedded base only; set "
            "it to change it."
        )
        fields.insert(0, f"training.learning_rate={USUAL_RATE}")
    if not own_rows:
        return load_recipe(default, [*fields, *flags])
    recipe = load_recipe(None, [*fields, *flags])
    complain(
        "fields that you do not set have their own defaults, since the default recipe's partition and rounds suit the "
        "embedded rows only."
    )
    return recipe


def trusted_recipe(
    words: list[str] | None,
    flags: list[str],
    trust: bool,
    default: str = "default",
    own: str | None = None,
    *,
    arms: bool = False,
) -> Recipe:
    """Return the recipe that the command line describes, once its person agrees to the code that it would run.

    Args:
        words: recipe and fields.
        flags: fields that flags set.
        trust: whether the person has agreed beforehand.
        default: the recipe to take where none is named.
        own: the one to take for rows of one's own, where none is named; None has none.
        arms: whether the arms of its comparison are run, too.

    Raises:
        RecipeError: there is no such recipe, or the person does not agree.
    """
    from bellwether.recipe.consent import code_in

    recipe = given_recipe(words, flags, default, own, arms=arms)
    agree(_file(words or []) or "The recipe", code_in(recipe, arms=arms), trust, [*(words or []), *flags])
    return recipe


def resumed_recipe(folder: Path, words: list[str], flags: list[str], trust: bool) -> Recipe | None:
    """Return the recipe that the command line asks a run to go on with; None where it asks for nothing.

    Its person agrees to the code of the folder's own recipe, which is the one that is run.
    """
    from bellwether.recipe.consent import code_in
    from bellwether.recipe.file import load_recipe
    from bellwether.store.checkpoint import RECIPE

    kept = _kept_recipe(folder)
    if kept is not None:
        agree(str(folder), code_in(kept), trust, [*words, *flags])
    if not words and not flags:
        return None
    if any("=" not in word for word in words) or not (folder / RECIPE).is_file():
        return given_recipe(words, flags)
    return load_recipe(folder / RECIPE, [*words, *flags])


def resumed_comparison(folder: Path, words: list[str], flags: list[str], trust: bool) -> Recipe:
    """Return the recipe of a comparison to go on with, as the command line asks for it, or as its folder keeps it.

    Raises:
        CheckpointError: the folder holds no comparison.
        RecipeError: the person does not agree to the code that it names.
    """
    from bellwether.recipe.consent import code_in
    from bellwether.store.finished import is_run

    kept = _kept_recipe(folder)
    if kept is None or kept.compare is None or is_run(folder):
        what = "no comparison" if kept is None else f"a run; go on with bellwether run --resume {folder}, or"
        raise CheckpointError(f"{folder} holds {what}{';' if kept is None else ''} give the folder of a comparison.")
    asked = resumed_recipe(folder, words, flags, trust=True) or kept
    codes = dict.fromkeys([*code_in(kept, arms=True), *code_in(asked, arms=True)])
    agree(" or ".join([str(folder), *filter(None, [_file(words)])]), list(codes), trust, [*words, *flags])
    return asked


def of_one_seed(recipe: Recipe, seed: int | None) -> Recipe:
    """Return a comparison whose draws all derive from one seed; None leaves it as it is, and so does no comparison."""
    from bellwether.recipe.file import with_overrides

    if seed is None or recipe.compare is None:
        return recipe
    fields = ["compare.seeds", *(["compare.tune.seeds"] if recipe.compare.tune else [])]
    return with_overrides(recipe, {field: [seed] for field in fields})


def check_rounds(recipe: Recipe, rounds: int | None) -> None:
    """Refuse a number of rounds where no arm of a comparison counts them.

    Args:
        recipe: one without a comparison is not looked at.
        rounds: as the command line gives them.

    Raises:
        RecipeError: all arms count passes or steps.
    """
    compare = recipe.compare
    if compare is None or rounds is None:
        return
    counting = [
        name
        for name, arm in compare.arms.items()
        if arm.learns and name not in compare.tuned and arm.passes is None and arm.steps is None
    ]
    if not counting:
        field = "compare.tune.passes" if compare.tuned else "compare.arms.NAME.passes"
        raise RecipeError(
            f"command line: --rounds has no effect, since no arm of {recipe.name} counts rounds; set {field}."
        )


def agree_to_folder(folder: Path, trust: bool, model: str | None = None, rows: bool = False) -> None:
    """Let the person agree to the code that loading a folder's base model, and dealing its rows, would run.

    Args:
        folder: of a run or a comparison; others name no code.
        trust: whether the person has agreed beforehand.
        model: path or hub name of the base, instead of the folder's.
        rows: whether the folder's rows are dealt anew, too.

    Raises:
        RecipeError: the person does not agree.
    """
    from bellwether.recipe.consent import code_in, model_code
    from bellwether.recipe.file import with_overrides

    kept = _kept_recipe(folder)
    if kept is not None:
        recipe = kept if model is None else with_overrides(kept, {"model.path": model})
        dealing = [code for code in code_in(recipe) if code.field == "partition.method"] if rows else []
        agree(str(folder), [*model_code(recipe), *dealing], trust)


def _kept_recipe(folder: Path) -> Recipe | None:
    """Return the recipe that a folder keeps; None where none can be read, which every command says in its own words."""
    from bellwether.recipe.file import load_recipe
    from bellwether.store.checkpoint import RECIPE

    try:
        return load_recipe(folder / RECIPE)
    except RecipeError:
        return None


def agree(place: str, codes: Sequence[Code], trust: bool, typed: Iterable[str] = ()) -> None:
    """Let the person at the keyboard agree to run code that a file names, unless they typed all of it themselves.

    Args:
        place: the file or folder that names it.
        codes: what would be run.
        trust: whether the person has agreed beforehand.
        typed: words of the command line.

    Raises:
        RecipeError: they do not agree, or cannot be asked.
    """
    from bellwether.recipe.consent import not_typed

    foreign = [] if trust else not_typed(codes, [word for word in typed if "=" in word])
    if not foreign:
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        listed = ", ".join(code.described for code in foreign)
        raise RecipeError(f"{place} would run Python code: {listed}; if you trust it, give --trust-code.")
    listed = "".join(f"  {code.described}\n" for code in foreign)
    sys.stderr.write(printable(f"{place} would run Python code on this machine, with your rights:\n{listed}"))
    sys.stderr.write("Run it? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RecipeError("The code is not trusted, so nothing was run.")


def _tell_foreign_rates(file: str, recipe: Recipe, typed: Sequence[str], arms: bool) -> None:
    """Warn of learning rates that are meant for the embedded base, where a recipe runs on another one.

    Args:
        file: path or name of the recipe.
        recipe: as it runs.
        typed: fields of the command line.
        arms: whether its arms are run.
    """
    from bellwether.recipe.file import find_recipe, load_recipe

    if recipe.model.path == "starter":
        return
    try:
        own = load_recipe(find_recipe(file))
    except RecipeError:  # what it leaves open is on the command line, and with it who it is meant for
        return
    set_here = {field.partition("=")[0] for field in typed}
    rates: dict[str, float] = {}
    meant = own.model.path == "starter"
    compare = recipe.compare if arms else None
    if meant or "learning_rate" not in own.training.model_fields_set:
        rates["training.learning_rate"] = recipe.training.learning_rate
    if compare is not None and meant:
        learning = {name: arm for name, arm in compare.arms.items() if arm.learns}
        rates |= {f"compare.arms.{name}.learning_rate": arm.learning_rate or 0.0 for name, arm in learning.items()}
        if compare.tune is not None:
            rates |= {"compare.tune.learning_rates": max(compare.tune.learning_rates)}
        if all(arm.learning_rate or name in compare.tuned for name, arm in learning.items()):
            rates.pop("training.learning_rate")
    rates = {field: rate for field, rate in rates.items() if rate and field not in set_here}
    if rates:
        values = ", ".join(f"{rate:g}" for rate in sorted(set(rates.values())))
        fields = list(rates)
        more = f" and {counted(len(fields) - 1, 'more field')}" if len(fields) > 1 else ""
        other = f", or take the recipe {OWN_TABLE}" if arms else ""
        complain(
            f"warning: {fields[0]}{more} ({values}) {'is' if len(fields) == 1 else 'are'} meant for the embedded base, "
            f"and the model is {recipe.model.path}; {USUAL_RATE:g} is usual with AdamW: set "
            f"{fields[0]}={USUAL_RATE:g}{other}."
        )


def _file(words: Sequence[str]) -> str | None:
    """Return the one recipe among the words, None where they name none."""
    from bellwether.recipe.recipe import Recipe

    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        fieldlike = [name for name in names if name.partition(".")[0] in Recipe.model_fields]
        if fieldlike:
            raise RecipeError(f"command line: {fieldlike[0]!r} sets no value; write {fieldlike[0]}=VALUE.")
        raise RecipeError(f"command line: give one recipe, not {len(names)} ({', '.join(names)}).")
    return names[0] if names else None


def _without_what_fields_set(flags: list[str], fields: list[str]) -> list[str]:
    """Return the fields of flags without those that are only emptied by the way, and set by the person."""
    given = {field.partition("=")[0] for field in fields}
    return [flag for flag in flags if flag not in CLEARED or flag.partition("=")[0] not in given]


def _only_embedded(fields: Sequence[str]) -> bool:
    """Return whether those of the fields that name sources, of which there may be none, name embedded rows alone."""
    from bellwether.recipe.file import load_recipe

    sources = [field for field in fields if field.startswith("data.sources=")]
    try:
        return all(source.partition(":")[0] == "starter" for source in load_recipe(None, sources).data.sources)
    except RecipeError:  # told together with the mistakes of other fields
        return False


def require_flower() -> None:
    """Refuse to go on where Flower is not installed, or another version of it than is relied upon.

    Raises:
        FederationError: it is not.
    """
    import importlib.metadata

    try:
        found = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise FederationError(
            "A federation across sites needs Flower, which is not installed here: run pip install -c constraints.txt "
            "-e '.[federation]' in bellwether's folder."
        ) from None
    if not found.startswith("1.42."):
        raise FederationError(
            f"A federation across sites needs Flower 1.42, and {found} is installed here: run pip install -c "
            "constraints.txt -e '.[federation]' in bellwether's folder."
        )
