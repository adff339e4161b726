"""Merging an adapter into a plain model folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from rounding import FLOAT64, coarse
from tiny_models import ARCHITECTURES, in_float64, padded, random_adapter, tiny_base, tiny_folder

from bellwether.errors import BellwetherError, CheckpointError, ModelError
from bellwether.exchange.adapter import adapter_files, read_adapter
from bellwether.model.base import load_base
from bellwether.model.export import export
from bellwether.model.folder import quiet_transformers
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe
from bellwether.recipe.file import dump_recipe, load_recipe
from bellwether.runner.prepare import prepare


def adapter_folder(folder: Path, adapter) -> Path:
    folder.mkdir(parents=True)
    for name, content in adapter_files(adapter).items():
        (folder / name).write_bytes(content)
    return folder


def logits(model):
    ids_NT, attention_NT = padded([9, 6])
    with torch.no_grad():
        return model(input_ids=ids_NT, attention_mask=attention_NT).logits


@pytest.fixture
def llama(tmp_path):
    """A base folder and the folder of an adapter that names it."""
    base = load_base(recipe.Model(path=str(tiny_folder("llama", tmp_path / "base")), device="cpu"))
    return base, adapter_folder(tmp_path / "adapter", random_adapter(base, dtype="float32"))


def test_of_a_comparison_the_runs_that_can_be_exported_are_named(tiny_comparison, tmp_path):
    with pytest.raises(ModelError, match=r"holds no run of its own; of this comparison, give one of .*/run\.$"):
        export(tiny_comparison, tmp_path / "out")


@pytest.mark.parametrize("merge", [True, False])
def test_chat_templates_of_several_names_are_all_exported(merge, llama, tmp_path):
    from transformers import AutoTokenizer

    base, folder = llama
    named = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools | length }} {{ messages[0].content }}"}
    base.tokenizer.chat_template = named
    base.tokenizer.save_pretrained(tmp_path / "base")
    export(folder, tmp_path / "out", merge=merge)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    asked = [{"role": "user", "content": "Why?"}]
    assert tokenizer.apply_chat_template(asked, tools=[tool], tokenize=False) == "1 Why?"
    assert tokenizer.apply_chat_template(asked, tokenize=False) == "Why?"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_merged_model_has_the_adapters_logits(architecture, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(tiny_folder(architecture, tmp_path / "base"))
        model.load_state_dict({name: coarse(weight) for name, weight in model.state_dict().items()})
        model.save_pretrained(tmp_path / "base")
    base = load_base(recipe.Model(path=str(tmp_path / "base"), device="cpu"))
    adapter = random_adapter(base, rank=4, alpha=8, dtype="float32")
    # W + 2 B A is made of so few bits that float32 holds it as it is: the merged weights are exact.
    adapter = adapter.with_tensors({key: coarse(value) for key, value in adapter.tensors.items()})
    export(adapter_folder(tmp_path / "adapter", adapter), tmp_path / "merged")
    with quiet_transformers():
        merged = in_float64(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    exact = in_float64(base.model)
    bare = logits(exact)
    layers = LoraLayers(exact, adapter.config, dtype=torch.float64)
    layers.load(0, adapter.tensors)
    torch.testing.assert_close(logits(merged), logits(exact), atol=FLOAT64, rtol=0)
    assert (logits(merged) - bare).abs().max() > 0.05
    text = "### Instruction:\nName three colours."
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text).input_ids == base.tokenizer(text).input_ids


def test_a_run_folder_is_exported_with_the_base_of_its_recipe(llama, tmp_path):
    base, adapter = llama
    run = tmp_path / "run"
    run.mkdir()
    written = recipe.Recipe(model=recipe.Model(path=base.name, dtype="bfloat16"))
    (run / "recipe.yaml").write_text(dump_recipe(written))
    with pytest.raises(ModelError, match="not finished"):
        export(run, tmp_path / "merged")
    adapter.rename(run / "adapter")
    export(run, tmp_path / "merged")
    assert load_base(recipe.Model(path=str(tmp_path / "merged"), dtype="bfloat16")).facts.parameters > 0


def test_another_base_may_be_named(llama, tmp_path):
    adapter = llama[1]
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError):
        export(adapter, tmp_path / "merged")
    export(adapter, tmp_path / "merged", str(tmp_path / "moved"))
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_merged_model_keeps_the_precision_of_the_bases_files(stored, tmp_path):
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        folder = tiny_folder("llama", tmp_path / "base")
        AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    base = load_base(recipe.Model(path=str(folder), device="cpu"))  # computes in float32 whatever is stored
    adapter = random_adapter(base, rank=4, alpha=8, dtype="float32")
    export(adapter_folder(tmp_path / "adapter", adapter), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == stored
    was = base.model.state_dict()
    for path in adapter.config.modules:
        a, b = (torch.from_numpy(adapter.tensors[f"base_model.model.{path}.lora_{x}.weight"]).double() for x in "AB")
        exact = was[f"{path}.weight"].double() + 2.0 * (b @ a)
        # A sum of four products and one addition in float32, and one rounding to what is stored.
        size = was[f"{path}.weight"].double().abs() + 2.0 * (b.abs() @ a.abs())
        bound = torch.finfo(stored).eps / 2 * exact.abs() + 8 * torch.finfo(torch.float32).eps * size + 1e-7
        assert ((merged.state_dict()[f"{path}.weight"].double() - exact).abs() <= bound).all(), path


def test_weights_that_do_not_fit_into_the_bases_precision_are_not_written(tmp_path):
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        folder = tiny_folder("llama", tmp_path / "base")
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    base = load_base(recipe.Model(path=str(folder), device="cpu"))
    adapter = random_adapter(base, dtype="float32")
    adapter = adapter.with_tensors({key: 1000 * value for key, value in adapter.tensors.items()})
    with pytest.raises(ModelError, match="does not fit into float16; use --adapter"):
        export(adapter_folder(tmp_path / "adapter", adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("words", [[], ["--adapter"]])
def test_what_is_exported_of_a_run_renders_prompts_as_they_were_trained(words, tiny_run, bellwether, tmp_path):
    """The run trained in Alpaca's format, of which its base's tokenizer knows nothing."""
    from transformers import AutoTokenizer

    done = bellwether("export", tiny_run[0], "out", *words)
    assert done.code == 0, done.err
    prepared = prepare(load_recipe(tiny_run[0] / "recipe.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = [row for client in prepared.clients.values() for row in client.rows]
    assert any(row.row.context for row in rows)
    for row in rows:
        asked = {"role": "user", "content": row.row.instruction, "context": row.row.context}
        messages = [asked, {"role": "assistant", "content": row.row.response}]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        assert whole[: len(row)] == row.ids_T.tolist()  # data.max_tokens may have cut the row
        prompt = tokenizer.apply_chat_template([asked], add_generation_prompt=True, return_dict=False)
        assert prompt == row.ids_T[: row.prompt_length].tolist()


def test_an_exported_adapter_is_the_runs_own_and_names_the_base_that_is_given(tiny_run, bellwether, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    moved = tmp_path / "moved"
    shutil.copytree(load_recipe(tiny_run[0] / "recipe.yaml").model.path, moved)
    assert bellwether("export", tiny_run[0], "out", "--adapter", "--model", moved).code == 0
    written, kept = read_adapter(tmp_path / "out"), read_adapter(tiny_run[0] / "adapter")
    assert written.fingerprint() == kept.fingerprint()
    assert written.config == dataclasses.replace(kept.config, base_model=str(moved))
    assert (tmp_path / "out" / "README.md").read_text() == (tiny_run[0] / "adapter" / "README.md").read_text()
    assert not (tmp_path / "out" / "config.json").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(moved), tmp_path / "out")
    other = tiny_folder("gpt2", tmp_path / "gpt2")
    failed = bellwether("export", tiny_run[0], "wrong", "--adapter", "--model", other)
    assert failed.code == 2
    assert not (tmp_path / "wrong").exists()


def test_an_adapter_without_a_recipe_keeps_the_bases_own_template(llama, bellwether, tmp_path):
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert bellwether("export", llama[1], "merged").code == 0
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_a_folder_that_is_not_empty_is_left_alone(llama, tmp_path):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        export(llama[1], out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    export(llama[1], out)
    assert (out / "config.json").is_file()


def test_an_empty_folder_that_is_the_current_one_is_filled_and_stays_the_same(llama, tmp_path, monkeypatch):
    out = tmp_path / "here"
    out.mkdir()
    monkeypatch.chdir(out)
    before = out.stat().st_ino
    export(llama[1], Path("."))
    assert out.stat().st_ino == before
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in Path(".").iterdir()}
    assert not [path for path in (*out.iterdir(), *tmp_path.iterdir()) if path.name.startswith(".tmp-")]


def test_a_base_with_an_adapter_beside_it_is_not_exported(llama, tmp_path):
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        export(llama[1], tmp_path / "merged")


def test_an_adapter_of_another_model_leaves_nothing_behind(llama, tmp_path):
    other = adapter_folder(tmp_path / "other", random_adapter(tiny_base("gpt2"), dtype="float32"))
    with pytest.raises(ModelError, match="does not have"):
        export(other, tmp_path / "merged", llama[0].name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


def test_an_unwritable_place_and_a_folder_without_adapter_are_refused(llama, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BellwetherError):
        export(llama[1], tmp_path / "file" / "merged")
    with pytest.raises(ModelError, match="neither a run nor an adapter"):
        export(tmp_path, tmp_path / "merged")
