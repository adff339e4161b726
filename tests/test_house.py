"""The plan of the house: imports run downwards only, also through a third room, and nothing heavy where it must not."""

import ast
import functools
import re
from collections import deque
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bellwether"

# Top floor first. A room imports rooms below its floor only; the files of one room import each other without circles.
FLOORS = [
    {"cli"},
    {"arms", "site"},
    {"runner"},
    {"engine"},
    {"client", "federate", "ask", "report"},
    {"model", "method", "store", "tell"},
    {"data", "exchange"},
    {"recipe"},
    {"tools"},
    {"errors"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# What no file of a room may reach, whatever it imports on the way: other rooms, and packages.
OUT_OF_REACH = {
    "ask": {"bellwether.runner", "bellwether.arms", "bellwether.federate", "bellwether.engine"},
    "report": {"bellwether.runner", "bellwether.arms", "bellwether.client", "bellwether.model", "torch"},
    "federate": {"bellwether.engine", "bellwether.client", "bellwether.model", "bellwether.data", "torch"},
    "client": {"bellwether.federate", "bellwether.engine"},
    "method": {"bellwether.model", "bellwether.store", "bellwether.tell", "bellwether.data"},
    "model": {"bellwether.data", "bellwether.method"},
    "store": {"bellwether.model", "bellwether.client", "torch"},
    "tell": {"bellwether.model", "bellwether.method"},
    "data": {"bellwether.model", "torch"},
    "exchange": {"bellwether.data", "torch"},
    "recipe": {"torch", "numpy"},
    "tools": {"bellwether.recipe"},
    "errors": {"numpy", "torch", "pydantic"},
}

# What a file of a room may not import itself.
NOT_ITSELF = {
    "cli": {"torch", "numpy"},
    "method": {"torch", "json", "pathlib", "logging"},
    "ask": {"bellwether.data.partition"},
}


# A generator of torch's, for those who have imported torch themselves.
LATE = {("bellwether.tools.randomness", "torch")}


def files():
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.stem.startswith("__"))


def named(path: Path) -> str:
    """The module's dotted name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {named(path): path for path in files()}


def room_of(module: str) -> str:
    return module.split(".")[1]


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """What a file imports, at its head or inside a function, but not for types alone."""
    found, waiting = set(), deque([ast.parse(path.read_text())])
    while waiting:
        node = waiting.popleft()
        waiting.extend(ast.iter_child_nodes(node) if not is_for_types_only(node) else node.orelse)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            # Of a name that is a module, the package around it holds nothing but its docstring.
            found |= inner if len(inner) == len(node.names) else {node.module, *inner}
    return frozenset(found)


def inside(name: str, place: str) -> bool:
    return f"{name}.".startswith(f"{place}.")


def chain(start: str, place: str) -> list[str] | None:
    """The shortest chain of imports from a module to something inside a place; None where there is none."""
    seen, waiting = {start}, deque([[start]])
    while waiting:
        way = waiting.popleft()
        for name in sorted(imports(MODULES[way[-1]])):
            if inside(name, place) and (way[-1], name) not in LATE:
                return [*way, name]
            if name in MODULES and name not in seen:
                seen.add(name)
                waiting.append([*way, name])
    return None


def test_every_module_has_a_room_and_the_house_is_small():
    rooms = {room_of(module) for module in MODULES}
    assert rooms == FLOOR.keys(), "a room has no floor, or a floor no room"
    assert len(rooms) <= 18
    assert len(FLOORS) <= 10


def test_contributing_lists_every_room_on_its_floor():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted((str(number + 1), room) for room, number in FLOOR.items())


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_room_reaches_only_rooms_on_floors_below(room):
    level_or_above = {other for other in FLOOR if FLOOR[other] <= FLOOR[room]} - {room}
    for module in (module for module in MODULES if room_of(module) == room):
        for other in sorted(level_or_above):
            way = chain(module, f"bellwether.{other}")
            assert way is None, f"{room} reaches {other}, which is not below it: {' → '.join(way)}"


@pytest.mark.parametrize("room", sorted(OUT_OF_REACH))
def test_a_room_never_reaches_what_it_must_not_know(room):
    for module in (module for module in MODULES if room_of(module) == room):
        for place in sorted(OUT_OF_REACH[room]):
            way = chain(module, place)
            assert way is None, f"{room} must not know {place}: {' → '.join(way)}"


@pytest.mark.parametrize("room", sorted(NOT_ITSELF))
def test_a_room_does_not_import_what_is_not_its_business(room):
    for module in (module for module in MODULES if room_of(module) == room):
        for name in imports(MODULES[module]):
            assert not any(inside(name, place) for place in NOT_ITSELF[room]), f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_itself_by_way_of_others(module):
    way = chain(module, module)
    assert way is None, f"a circle: {' → '.join(way)}"


def test_nothing_inside_imports_the_packages_own_face():
    for module in MODULES:
        assert "bellwether" not in imports(MODULES[module]), f"{module} imports bellwether itself"


def test_a_package_file_holds_nothing_but_its_docstring():
    for path in files():
        if path.name == "__init__.py":
            assert len(ast.parse(path.read_text()).body) == 1, path


def test_what_makes_the_embedded_world_stands_outside_and_nothing_of_the_package_needs_it():
    for module in MODULES:
        assert not any(inside(name, "starter") for name in imports(MODULES[module])), module


def test_nothing_seeds_or_uses_a_global_generator():
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in {"torch.manual_seed", "random.seed", "np.random.seed", "set_seed"}, path
            assert not called.startswith("np.random.") or called in {"np.random.default_rng", "np.random.Generator"}, (
                path
            )


def test_no_file_is_unpickled():
    for path in files():
        assert not {name for name in imports(path) if name.split(".")[0] in {"pickle", "dill", "cloudpickle"}}, path
        assert "torch.load(" not in path.read_text(), path
