"""Reading an adapter from files that a person may have edited, cut off or made elsewhere."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tiny_models import random_adapter, tiny_base

from bellwether.errors import ModelError
from bellwether.exchange.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_files, read_adapter

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The files of an adapter of rank 3."""
    return adapter_files(random_adapter(tiny_base("llama"), dtype="float32"))


@pytest.fixture
def folder(files, tmp_path):
    """A folder with an adapter, to be spoilt."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def refused(folder) -> str:
    """Return the one sentence that the adapter in a folder is refused with."""
    with pytest.raises(ModelError) as caught:
        read_adapter(folder)
    text = str(caught.value)
    assert text.startswith(f"The adapter in {folder} cannot be read: ")
    assert text.isprintable()
    assert text.endswith(".")
    return text


def change_header(folder, old: str, new: str) -> None:
    """Replace text in the header of the weights."""
    raw = (folder / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].decode()
    assert old in header
    header = header.replace(old, new, 1)
    header += " " * (-len(header) % 8)
    (folder / WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header.encode() + raw[8 + length :])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": None}, "r in adapter_config.json is None, but a finite number is wanted"),
        ({"r": 10**400}, "too large"),
        ({"r": 4}, "q_proj are not of rank 4"),
        ({"r": 2.5}, "not of rank 2.5"),
        ({"lora_alpha": "x"}, "lora_alpha in adapter_config.json is 'x'"),
        ({"lora_alpha": None}, "lora_alpha in adapter_config.json is None"),
        ({"lora_alpha": True}, "lora_alpha in adapter_config.json is True"),
        ({"lora_alpha": math.nan}, "lora_alpha in adapter_config.json is nan"),
        ({"lora_alpha": math.inf}, "lora_alpha in adapter_config.json is inf"),
        ({"lora_dropout": [0.5]}, "lora_dropout in adapter_config.json is"),
    ],
)
def test_numbers_that_are_none_are_refused(changes, says, folder):
    path = folder / CONFIG_FILE
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    assert says in refused(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "is no JSON object"),
        ("7", "is no JSON object"),
        ("{", "Expecting"),
        ("[" * 100_000, "recursion"),
        ('{"r": ' + "9" * 5000 + "}", "limit"),
        ("{}", "not a plain LoRA adapter"),
        ("\udcff", "codec"),
    ],
)
def test_a_configuration_that_is_none_is_refused(text, says, folder):
    (folder / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert says in refused(folder)


@pytest.mark.parametrize("modules", ["not json", "5", "[[]", '{"a": 1', "[" * 50_000])
def test_metadata_that_names_no_modules_is_refused(modules, files, folder):
    from safetensors.numpy import load, save_file

    save_file(load(files[WEIGHTS_FILE]), folder / WEIGHTS_FILE, metadata={"modules": modules})
    refused(folder)


def test_an_adapter_without_metadata_is_read(files, folder):
    from safetensors.numpy import load, save_file

    save_file(load(files[WEIGHTS_FILE]), folder / WEIGHTS_FILE)
    assert sorted(read_adapter(folder).tensors) == sorted(load(files[WEIGHTS_FILE]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value, files, folder):
    from safetensors.numpy import load, save_file

    tensors = load(files[WEIGHTS_FILE])
    tensors[A] = tensors[A].copy()
    tensors[A][1, 2] = value
    save_file(tensors, folder / WEIGHTS_FILE)
    assert f"{A} holds something else than finite floats" in refused(folder)


def test_weights_that_are_no_floats_no_matrices_or_no_pairs_are_refused(files, folder):
    from safetensors.numpy import load, save_file

    tensors = load(files[WEIGHTS_FILE])
    for changed, says in [
        (tensors | {A: np.ones((3, 24), np.int32)}, "finite floats"),
        (tensors | {A: np.ones(3, np.float32)}, "are not of rank 3"),
        ({key: value for key, value in tensors.items() if key != A}, "not a plain LoRA adapter"),
        (tensors | {"q_proj.lora_A.weight": tensors[A]}, "not a plain LoRA adapter"),
    ]:
        save_file(changed, folder / WEIGHTS_FILE)
        assert says in refused(folder)


def test_a_header_that_names_a_tensor_twice_is_refused(folder):
    raw = (folder / WEIGHTS_FILE).read_bytes()
    entry = json.dumps(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])[A], separators=(",", ":"))
    change_header(folder, f'"{A}":{entry}', f'"{A}":{entry},"{A}":{entry}')
    assert f"names '{A}' more than once" in refused(folder)


def test_weights_that_are_cut_off_are_refused(files, folder):
    for length in (0, 4, 100, len(files[WEIGHTS_FILE]) - 1):
        (folder / WEIGHTS_FILE).write_bytes(files[WEIGHTS_FILE][:length])
        refused(folder)
