"""What ``import bellwether`` gives."""

import subprocess
import sys

import pytest

import bellwether


def test_importing_bellwether_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import bellwether; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names) == {"bellwether"}


def test_all_is_what_can_be_imported():
    namespace = {}
    exec("from bellwether import *", namespace)
    del namespace["__builtins__"]
    assert sorted(namespace) == sorted(bellwether.__all__)
    assert dir(bellwether) == sorted(bellwether.__all__)
    assert set(bellwether._HOMES) | {"__version__"} == set(bellwether.__all__)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="nonesuch"):
        bellwether.nonesuch  # noqa: B018
