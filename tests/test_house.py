"""The plan of the house: a room uses rooms below it, never above, and nothing heavy where it must not."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bellwether"

# Top floor first; a module may import from its own floor or from floors below.
FLOORS = [
    {"cli", "__main__"},
    {"report"},
    {"page"},
    {"judge_table"},
    {"chat", "ask", "compare_show", "judge"},
    {"talk"},
    {"compare_table", "answerers", "answers", "judge_folder"},
    {"compare"},
    {"comparison", "finished"},
    {"arms", "compare_folder"},
    {"runner", "init", "plan", "describe", "export"},
    {"prepare"},
    {"live", "trackers", "model_card", "federate"},
    {"survey"},
    {"narrate", "engine", "run_folder"},
    {"client", "checkpoint", "lock", "chosen"},
    {"questions"},
    {"cohort", "aggregate", "select", "history", "atomic", "journal", "model", "data"},
    {"functions", "wire", "records", "workers", "spreadsheet", "judge_api"},
    {"messages"},
    {"recipe_file", "schedule"},
    {"contradictions"},
    {"evaluate", "adapter", "recipe", "randomness", "starter"},
    {"recipe_compare", "recipe_selection"},
    {"recipe_section"},
    {"errors"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# What a room may not know, whatever its floor.
FORBIDDEN = {
    "cli": {"torch", "numpy"},
    "chat": {"torch", "bellwether.model", "bellwether.client"},
    "ask": {"torch", "bellwether.model", "bellwether.client"},
    "questions": {"torch", "bellwether.model"},
    "federate": {"torch", "bellwether.engine", "bellwether.client", "bellwether.model", "bellwether.data"},
    "survey": {"torch", "bellwether.engine", "bellwether.client", "bellwether.model", "bellwether.data"},
    "wire": {"torch"},
    "report": {"torch", "bellwether.runner", "bellwether.model", "bellwether.client", "bellwether.data"},
    "page": {"torch", "bellwether.runner", "bellwether.model", "bellwether.client", "bellwether.data"},
    "compare_table": {"torch", "bellwether.runner", "bellwether.model", "bellwether.client", "bellwether.data"},
    "workers": {"torch"},
    "aggregate": {"torch", "bellwether.engine", "bellwether.model", "bellwether.client", "bellwether.run_folder"},
    "select": {"torch", "bellwether.engine", "bellwether.model", "bellwether.client", "bellwether.run_folder"},
    "evaluate": {"torch", "bellwether.engine", "bellwether.model", "bellwether.client", "bellwether.run_folder"},
    "client": {"bellwether.federate", "bellwether.aggregate", "bellwether.engine"},
    "engine": {"bellwether.federate", "bellwether.aggregate"},
    "data": {"bellwether.model", "torch"},
    "model": {"bellwether.data", "bellwether.client"},
    "starter": {"bellwether.data", "bellwether.model", "bellwether.client", "bellwether.recipe"},
    "narrate": {"bellwether.federate"},
    "live": {"bellwether.federate"},
}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "bellwether"}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_uses_only_rooms_on_its_floor_or_below(path):
    room = room_of(path)
    assert room in FLOOR, f"{room} has no place in the house; give it one"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "bellwether" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != room:
            assert FLOOR[parts[1]] >= FLOOR[room], f"{room} imports {name}, which is above it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_knows_nothing_of_what_it_must_not_know(path):
    for name in imports(path):
        for forbidden in FORBIDDEN.get(room_of(path), ()):
            assert not f"{name}.".startswith(f"{forbidden}."), f"{path.name} imports {name}"


def test_nothing_seeds_or_uses_a_global_generator():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in {"torch.manual_seed", "random.seed", "np.random.seed", "set_seed"}, path
            assert not called.startswith("np.random.") or called in {"np.random.default_rng", "np.random.Generator"}, (
                path
            )


def test_no_file_is_unpickled():
    for path in modules():
        assert not {name for name in imports(path) if name.split(".")[0] in {"pickle", "dill", "cloudpickle"}}, path
        assert "torch.load(" not in path.read_text() or "starter" in path.parts, path
