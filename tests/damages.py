"""What can become of a file: cut, emptied, lost, overwritten, or with one value in it that nobody wrote."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# As JSON has them, since some of them are no values of Python's own.
ODD = (
    *("NaN", "1e400", "-1e400", "-1", "0", "1e300", str(2**70), str(10**400), '""', '"\\u0000"', '"\\ud800"'),
    *("[]", "{}", "null", "true", '"NaN"', '"../../x"', json.dumps("long " * 2000)),
)
OTHERS = (b"[]", b"{}", b"3", b'"x"', b"null", b"NaN", b"[" * 100_000, b'{"a":' * 100_000)

_MARK = "the odd value stands here"


@dataclass(frozen=True)
class Damage:
    """What became of a file: what to call it, and its content; None where it is gone."""

    name: str
    content: bytes | None


def whole_file(content: bytes, seed: int) -> Iterator[Damage]:
    """Yield what can become of a file as a whole."""
    draw = random.Random(seed)
    yield Damage("deleted", None)
    yield Damage("emptied", b"")
    for size in sorted({1, len(content) // 3, len(content) // 2, len(content) - 1} - {0, len(content)}):
        yield Damage(f"cut to {size} of {len(content)} bytes", content[:size])
    yield Damage("binary junk", draw.randbytes(300))
    yield Damage("a line of binary junk", draw.randbytes(300) + b"\n")
    place = draw.randrange(len(content) + 1)
    yield Damage(f"no UTF-8 at byte {place}", content[:place] + b"\xff\xfe" + content[place:])
    place = draw.randrange(len(content)) if content else 0
    yield Damage(f"byte {place} is another", content[:place] + draw.randbytes(1) + content[place + 1 :])
    for other in OTHERS:
        yield Damage(f"{other[:10]!r} of {len(other)} bytes", other)
        if len(other) < 10:
            yield Damage(f"a line {other!r}", other + b"\n")


def one_value(path: Path) -> Iterator[Damage]:
    """Yield a file of JSON, lines of JSON or YAML with each of its values, in turn, replaced by each odd one."""
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines):
            for damage in _values(json.loads(line), f"line {number + 1}"):
                rest = b"".join(lines[:number]), b"\n" + b"".join(lines[number + 1 :])
                yield Damage(damage.name, rest[0] + (damage.content or b"") + rest[1])
    elif path.suffix in (".json", ".yaml"):
        yield from _values(yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content), "")


def _values(tree: Any, place: str) -> Iterator[Damage]:
    """Yield JSON in which one value is another."""
    for way in list(_ways(tree)):
        text = json.dumps(_with(tree, way, _MARK))
        for odd in ODD:
            name = f"{place} {'.'.join(map(str, way)) or 'all'} is {odd[:20]}".strip()
            yield Damage(name, text.replace(json.dumps(_MARK), odd).encode())


def _ways(tree: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the ways to all values in a value, itself among them."""
    yield way
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _ways(value, (*way, key))


def _with(tree: Any, way: tuple[Any, ...], value: Any) -> Any:
    """Return a value in which what is at the end of a way is another."""
    if not way:
        return value
    changed = tree.copy()
    changed[way[0]] = _with(tree[way[0]], way[1:], value)
    return changed


def forge(checkpoint: Path) -> None:
    """Give a damaged checkpoint a manifest that says that all is well."""
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != "manifest.json")
    files = {name: (checkpoint / name).read_bytes() for name in names}
    listed = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = {"format": 1, "round": int(checkpoint.name), "files": listed}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
