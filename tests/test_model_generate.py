"""Batched greedy generation against transformers, one prompt at a time."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import ARCHITECTURES, POSITIONS, random_adapter, tiny_base, tiny_folder

from bellwether.errors import ModelError
from bellwether.model.base import load_base
from bellwether.model.generate import answer_text, generate
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe


def greedy(base, prompt, steps, ends=(2,)):
    """The answer by the plainest loop: a full forward pass per token, no padding, no cache."""
    ids = list(prompt)
    for _ in range(steps):
        logits_NTV = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        token = int(logits_NTV[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


PROMPTS = [[1, 5, 9], [1, 40, 41, 42, 43, 44, 45, 46, 47], [77], [8, 100, 200, 250], [1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batches_answer_like_one_prompt_at_a_time(architecture):
    base = tiny_base(architecture)
    wanted = [greedy(base, prompt, 12) for prompt in PROMPTS]
    assert generate(base, PROMPTS, 12, batch_size=3) == wanted
    assert len({tuple(answer) for answer in wanted}) > 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_output_layer_gets_the_states_of_rows_side_by_side_so_that_it_is_not_copied_for_each(architecture):
    base = tiny_base(architecture)
    layer = base.model.get_output_embeddings()
    ordinary, seen = layer.forward, []
    layer.forward = lambda states: seen.append((tuple(states.shape[:2]), states.is_contiguous())) or ordinary(states)
    try:
        generate(base, PROMPTS, 4, batch_size=5)
    finally:
        del layer.forward
    assert seen
    assert set(seen) == {((5, 1), True)}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_a_batch_has_no_more_rows_than_their_keys_values_and_scores_have_a_place_for(architecture, monkeypatch):
    base, prompt, new = tiny_base(architecture), [1, 5, 9], 9
    ids_NT = torch.tensor([prompt * 4])
    kept = base.model(input_ids=ids_NT, use_cache=True).past_key_values.layers
    row = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept) + 3 * 4 * base.facts.vocabulary
    of_transformers, sizes = base.model.generate, []

    def spy(inputs, **settings):
        sizes.append(len(inputs))
        return of_transformers(inputs=inputs, **settings)

    monkeypatch.setattr(base.model, "generate", spy)
    for most, expected in ((2 * row, [2, 2, 1]), (2 * row - 1, [1] * 5), (0, [1] * 5), (9 * row, [4, 1])):
        monkeypatch.setattr("bellwether.model.generate.MOST_BYTES", most)
        sizes.clear()
        generate(base, [prompt] * 5, new, batch_size=4)
        assert sizes == expected


def test_answers_end_at_any_stop_token_and_leave_it_out():
    base = tiny_base("llama")
    free = generate(base, PROMPTS, 12, batch_size=8)
    stop = free[0][4]
    ended = dataclasses.replace(base, stop_ids=(2, stop))
    wanted = [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert generate(ended, PROMPTS, 12, batch_size=2) == wanted
    assert generate(base, PROMPTS, 12, batch_size=2, stop=[stop]) == wanted
    assert any(len(answer) < 12 for answer in wanted)


# Of a tokenizer whose tokens lie across the border of an answer and what ends it.
PIECES = {
    5: "Sky",
    6: " is",
    7: " blue.#",
    8: "## E",
    9: "nd",
    10: " more",
    11: "#",
    12: "##",
    13: " End",
    15: "Sea",
    16: "No",
}
SPELLED = SimpleNamespace(decode=lambda ids, **_: "".join(PIECES.get(i, "~") for i in ids if i), pad_token_id=0)


def saying(*chains):
    """A base that goes on from each token of a chain with the next one."""
    base = tiny_base("llama")
    with torch.no_grad():
        for layer in base.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        base.model.model.norm.weight.fill_(1)
        base.model.lm_head.weight.zero_()
        base.model.model.embed_tokens.weight.zero_()
        for place, token in enumerate(sorted({token for chain in chains for token in chain})):
            base.model.model.embed_tokens.weight[token, place] = 1
        for token, following in {pair for chain in chains for pair in itertools.pairwise(chain)}:
            base.model.lm_head.weight[following] += base.model.model.embed_tokens.weight[token]
    return dataclasses.replace(base, tokenizer=SPELLED)


def test_an_answer_ends_at_a_text_of_several_tokens_which_is_left_out():
    base = saying([100, 5, 6, 7, 8, 9, 10, 14, 14], [101, 15, 11, 12, 13, 15], [103, 16, 2])
    assert generate(base, [[100]], 9, batch_size=1) == [[5, 6, 7, 8, 9, 10, 14, 14, 14]]
    prompts, stop, heard = [[100], [7, 101], [103]], [2, "### End"], collections.defaultdict(list)

    def on_step(tokens):
        for number, token in tokens.items():
            heard[number].append(token)

    answers = generate(base, prompts, 9, batch_size=3, stop=stop, on_step=on_step)
    assert answers == [[5, 6, 7, 8, 9], [15, 11, 12, 13], [16]]
    assert [heard[number] for number in range(3)] == answers
    assert [answer_text(ids, SPELLED, stop) for ids in answers] == ["Sky is blue.", "Sea", "No"]


@pytest.mark.parametrize(
    ("ids", "ended"), [([5, 6, 7, 8, 9], True), ([5, 6, 7, 8, 9, 10], True), ([5, 6, 7, 8], False)]
)
def test_whoever_listens_is_told_that_an_answer_has_ended_by_a_text(ids, ended):
    from bellwether.ask.talk import _Said

    said = _Said("federated", SPELLED, [2, "### End"])
    for token in ids:
        said.take(token)
    assert said.answer(final=True).ended is ended


@pytest.mark.parametrize(
    ("end", "stops"),
    [
        ("###", "###"),  # one token where it stands alone, and others behind a letter
        (" END<|x|>", " END"),  # the token has no text in an answer
        ("\n<|x|>", "<|x|>"),
    ],
)
@pytest.mark.parametrize("name", ["byte-level BPE", "Metaspace, BOS"])
def test_of_what_ends_a_turn_generation_knows_the_text_before_a_token_of_its_own(end, stops, name):
    from data_tokenizers import family, with_chat

    from bellwether.data.prompts import end_of_turn, resolve_template

    template = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}"
        "{{ '\n' if m.role == 'user' else END }}{% endfor %}{{ 'A: ' if add_generation_prompt }}"
    )
    tokenizer = with_chat(family(name), template.replace("END", repr(end)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    found = end_of_turn(resolve_template(recipe.Data(template="chat"), tokenizer), tokenizer)
    wanted = tokenizer.convert_tokens_to_ids(stops) if stops == "<|x|>" else stops
    assert found == [tokenizer.eos_token_id, wanted]


def test_a_run_knows_the_end_of_a_turn_that_is_several_tokens(tiny_recipe, tmp_path):
    import yaml
    from data_tokenizers import CHATML

    from bellwether.recipe.file import load_recipe
    from bellwether.runner.prepare import prepare, prepared_fingerprint

    folder = Path(yaml.safe_load(tiny_recipe.read_text())["model"]["path"])
    shutil.copytree(folder, tmp_path / "chatty")
    (tmp_path / "chatty" / "chat_template.jinja").write_text(CHATML)
    prepared = prepare(load_recipe(tiny_recipe, ["data.template=chat", f"model.path={tmp_path / 'chatty'}"]))
    assert prepared.stop == [2, "<|im_end|>"]
    assert len(prepared_fingerprint(prepared)) == 64


def test_what_may_become_the_end_of_an_answer_is_held_back():
    told = [answer_text([5, 6, 7, 8, 9][:size], SPELLED, [2, "### End"], going_on=True) for size in range(1, 6)]
    assert told == ["Sky", "Sky is", "Sky is blue.", "Sky is blue.", "Sky is blue."]
    assert answer_text([5, 6, 7], SPELLED, ["### End"]) == "Sky is blue.#"  # nothing more has come


def test_each_prompt_is_answered_by_the_adapter_in_its_slot():
    base = tiny_base("opt")
    adapters = [random_adapter(base, seed=seed) for seed in range(2)]
    layers = LoraLayers(base.model, adapters[0].config, slots=2, dtype=torch.float64)
    wanted = []
    for slot, adapter in enumerate(adapters):
        layers.load(slot, adapter.tensors)
    for number, prompt in enumerate(PROMPTS):
        with layers.routed(torch.tensor([number % 2])):
            wanted.append(greedy(base, prompt, 8))
    slots = [number % 2 for number in range(len(PROMPTS))]
    assert generate(base, PROMPTS, 8, batch_size=3, layers=layers, slots=slots) == wanted
    with layers.disabled():
        assert generate(base, PROMPTS, 8, batch_size=3) != wanted
    layers.detach()


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_an_answer_ends_where_the_models_positions_end_whatever_its_neighbours(architecture):
    base = tiny_base(architecture)
    long = [3 + number % 290 for number in range(POSITIONS - 2)]
    answers = generate(base, [[5, 6, 7], long], 10, batch_size=4)
    assert len(answers[0]) == 10 or answers[0] == greedy(base, [5, 6, 7], 10)
    assert answers[1] == greedy(base, long, 3)
    with pytest.raises(ModelError, match="data.max_tokens"):
        generate(base, [[1] * (POSITIONS + 1)], 4, batch_size=1)
    with pytest.raises(ModelError, match="0 tokens"):
        generate(base, [[]], 4, batch_size=1)


def test_generation_settings_of_the_folder_do_not_leak_in(tmp_path):
    import json

    folder = tiny_folder("llama", tmp_path / "m")
    plain = generate(load_base(recipe.Model(path=str(folder), device="cpu")), PROMPTS, 10, batch_size=2)
    settings = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 2.0, "eos_token_id": [2, plain[0][3]]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    base = load_base(recipe.Model(path=str(folder), device="cpu"))
    assert base.stop_ids == tuple(sorted((2, plain[0][3])))
    stop = plain[0][3]
    wanted = [answer[: answer.index(stop)] if stop in answer else answer for answer in plain]
    assert generate(base, PROMPTS, 10, batch_size=2) == wanted


def test_generation_warns_of_nothing(recwarn, caplog):
    generate(tiny_base("gpt2"), PROMPTS, 3, batch_size=2)
    assert not [str(warning.message) for warning in recwarn if "generation" in str(warning.message)]
    assert not caplog.records


@pytest.mark.parametrize("chat", [True, False])
def test_the_prompt_that_the_docs_show_is_that_of_training(chat, monkeypatch):
    """The page's own code, with a tokenizer that puts BOS before every text, as its chat template does too."""
    import re

    from data_tokenizers import BRACKETS, metaspace, with_chat

    from bellwether.data.prompts import resolve_template
    from bellwether.data.rows import Row
    from bellwether.data.tokens import tokenise
    from bellwether.recipe import recipe

    tokenizer = with_chat(metaspace(), BRACKETS) if chat else metaspace()
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "generate" in text)
    asked = []
    model = SimpleNamespace(generate=lambda input_ids, **_: asked.append(input_ids) or input_ids)
    exec(code, {"tokenizer": tokenizer, "model": model})
    row = Row("Name three colours.", "Red.")
    settings = recipe.Data(max_tokens=512)
    (tokens,) = tokenise([row], tokenizer, settings, resolve_template(settings, tokenizer)).rows
    ids = asked[0][0].tolist()
    assert ids == tokens.ids_T[: tokens.prompt_length].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
