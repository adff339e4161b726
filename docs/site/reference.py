"""The directive of the reference: a name's signature and docstring, read from the source without importing it.

    .. api:: bellwether.run

Griffe reads the source, napoleon the sections of a docstring, and Sphinx resolves the types of a signature: one of
bellwether's own that stands nowhere in the reference is an error of a strict build, and so is a name without a
docstring. A type alias has none; what it is stands below the directive.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import griffe
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]


@functools.cache
def package() -> Any:
    """Return the package as griffe reads it."""
    return griffe.load("bellwether", search_paths=[ROOT])


class Api(SphinxDirective):
    """Describe one name of the package, and with a class its public methods and properties."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return what the page shows."""
        try:
            lines = described(self.arguments[0], [*self.content])
        except LookupError as error:
            raise self.error(str(error.args[0])) from error
        return self.parse_text_to_nodes("\n".join(lines), offset=self.content_offset)


def described(name: str, instead: Sequence[str]) -> list[str]:
    """Return the reStructuredText that describes a name.

    Args:
        name: dotted, such as ``bellwether.run``.
        instead: what is said in place of a docstring; a type alias has none.

    Raises:
        LookupError: there is no such name, or nothing is said of it.
    """
    found = _target(name)
    lines = [f".. py:{_kind(found)}:: {name}{_signature(found)}"]
    if found.is_attribute:
        lines.append(f"   :canonical: {_shown(found.value)}")
    elif found.path != name:
        lines.append(f"   :canonical: {found.path}")
    body = [*(instead or _docstring(found)), ""]
    for member in found.members.values() if found.is_class else ():
        if _is_shown(member):
            body += [*f".. py:{_kind(member)}:: {member.name}{_signature(member)}".splitlines(), ""]
            body += [*_indented(_docstring(member)), ""]
    return [*lines, "", *_indented(body)]


def documented(page: Path) -> list[str]:
    """Return the names that a page describes."""
    marked = (line.partition(".. api:: ") for line in page.read_text(encoding="utf-8").splitlines())
    return [name for before, mark, name in marked if mark and not before]


def _is_there(name: str) -> bool:
    """Return whether a dotted name is one of the package's."""
    try:
        package()[name.removeprefix("bellwether.")]
    except KeyError:
        return False
    return True


def _target(name: str) -> Any:
    """Return what a dotted name means."""
    if not _is_there(name):
        raise LookupError(f"The reference names {name}, which is not in the package.")
    found = package()[name.removeprefix("bellwether.")]
    return found.final_target if found.is_alias else found


def _kind(found: Any) -> str:
    """Return the directive of Python's domain that a thing wants."""
    if found.is_attribute:
        return "property" if "property" in found.labels else "type"
    if found.is_function:
        return "function" if found.parent.is_module else "method"
    return "exception" if found.parent.name == "errors" else "class"


def _is_shown(member: Any) -> bool:
    """Return whether a member is described: a public method or property, no field, which its class describes."""
    return not member.name.startswith("_") and (member.is_function or "property" in member.labels)


def _signature(found: Any) -> str:
    """Return the parameters and what is returned, with types as they can be linked to."""
    if found.is_attribute:
        return f"\n   :type: {_shown(found.annotation)}" if "property" in found.labels else ""
    # The fields of a recipe have a table of their own.
    if found.is_class and found.path.startswith("bellwether.recipe.recipe."):
        return ""
    parameters: list[str] = []
    for one in found.parameters:
        if one.kind is griffe.ParameterKind.keyword_only and "*" not in parameters:
            parameters.append("*")
        kind = f": {_shown(one.annotation)}" if one.annotation is not None else ""
        default = f" = {one.default}" if one.default is not None else ""
        parameters.append(f"{one.name}{kind}{default}")
    returns = f" -> {_shown(found.returns)}" if found.is_function and found.returns is not None else ""
    return f"({', '.join(one for one in parameters if one != 'self')}){returns}"


def _shown(expression: Any) -> str:
    """Return a type with the names of the package's own in full, so that they can be linked to."""
    if isinstance(expression, str) or expression is None:
        return str(expression)
    if isinstance(expression, griffe.ExprName | griffe.ExprAttribute):
        path = expression.canonical_path
        return path if path.startswith("bellwether.") and _is_there(path) else str(expression)
    return "".join(map(_shown, expression.iterate(flat=False)))


def _docstring(found: Any) -> list[str]:
    """Return a docstring as reStructuredText."""
    if found.docstring is None:
        raise LookupError(f"{found.path} stands in the reference and has no docstring.")
    # The docstring of a class describes its fields, which are its parameters.
    what = "class" if found.is_class else "function"
    config = Config(napoleon_use_rtype=False, napoleon_use_ivar=True)
    return GoogleDocstring(found.docstring.value, config, what=what, name=found.path).lines()


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"   {line}" if line else "" for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("api", Api)
    return {"version": "1", "parallel_read_safe": True}
