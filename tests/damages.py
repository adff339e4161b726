"""What can become of a file: cut, emptied, lost, overwritten, or with one value in it that nobody wrote."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
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
    """What becomes of a file: what to call it, and what makes its content of the whole one; None where it is gone."""

    name: str
    make: Callable[[bytes], bytes | None]

    def do(self, path: Path) -> None:
        """Damage a file."""
        content = self.make(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)


def of_file(size: int, seed: int = 0) -> list[Damage]:
    """Return what can become of a file of so many bytes as a whole."""
    draw = random.Random(seed)
    junk, byte, place = draw.randbytes(300), draw.randbytes(1), draw.randrange(size + 1)
    return [
        Damage("deleted", lambda whole: None),
        *(Damage(f"cut to {cut} of {size} bytes", lambda whole, cut=cut: whole[:cut]) for cut in _cuts(size)),
        Damage("binary junk", lambda whole: junk),
        Damage("a line of binary junk", lambda whole: junk + b"\n"),
        Damage(f"no UTF-8 at byte {place}", lambda whole: whole[:place] + b"\xff\xfe" + whole[place:]),
        Damage(f"byte {place} is another", lambda whole: whole[:place] + byte + whole[place + 1 :]),
        *(Damage(f"{other[:9]!r} of {len(other)} bytes", lambda whole, other=other: other) for other in OTHERS),
        *(Damage(f"a line {other!r}", lambda whole, other=other: other + b"\n") for other in OTHERS[:6]),
    ]


def _cuts(size: int) -> list[int]:
    return sorted({0, 1, size // 3, size // 2, max(0, size - 1)} - {size})


def of_values(path: Path) -> list[Damage]:
    """Return, for a file of JSON, lines of JSON or YAML, each of its values replaced by each odd one."""
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        trees = [(f"line {number + 1}: ", number, json.loads(line)) for number, line in enumerate(content.splitlines())]
    elif path.suffix in (".json", ".yaml"):
        trees = [("", None, _parsed(path.suffix, content))]
    else:
        return []
    return [
        Damage(
            f"{place}{'.'.join(map(str, way)) or 'all'} is {odd[:20]}",
            lambda whole, number=number, way=way, odd=odd: _replaced(path.suffix, whole, number, way, odd),
        )
        for place, number, tree in trees
        for way in _ways(tree)
        for odd in ODD
    ]


def _parsed(suffix: str, content: bytes) -> Any:
    return yaml.safe_load(content) if suffix == ".yaml" else json.loads(content)


def _replaced(suffix: str, content: bytes, number: int | None, way: tuple[Any, ...], odd: str) -> bytes:
    """Return the content of a file in which one value, of a line where there are lines, is an odd one."""
    if number is not None:
        lines = content.splitlines(keepends=True)
        lines[number] = _replaced(".json", lines[number], None, way, odd) + b"\n"
        return b"".join(lines)
    return json.dumps(_with(_parsed(suffix, content), way, _MARK)).replace(json.dumps(_MARK), odd).encode()


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
