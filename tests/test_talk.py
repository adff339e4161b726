"""Talking to what was tuned: several adapters over one base, drawn tokens, streamed answers, what is refused."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import json_lines
from data_tokenizers import chat
from test_model_generate import PROMPTS, greedy
from tiny_models import padded, random_adapter, tiny_base

from bellwether.ask import talk as talking
from bellwether.ask.answerers import Answerer
from bellwether.ask.questions import AnswerSettings, check_settings, make_question
from bellwether.ask.talk import conversation, find_examples, first_asked, open_talk
from bellwether.data.federated import load_federated
from bellwether.errors import DataError, RecipeError
from bellwether.exchange.adapter import adapter_files, key_a, key_b, side_by_side
from bellwether.model.generate import Sampling, generate
from bellwether.model.lora import LoraLayers
from bellwether.tools.randomness import Randomness

# Adapters over one base ---------------------------------------------------------------------------


def different_adapters(base):
    return [
        random_adapter(base, rank=3, alpha=5, seed=1),
        random_adapter(base, rank=5, alpha=7, rslora=True, seed=2),
        random_adapter(base, rank=2, alpha=4, target_modules=["q_proj", "down_proj"], seed=3),
    ]


def merged(base, adapter):
    """The model with W + scaling · B A written into its weights."""
    model = copy.deepcopy(base.model)
    for path in adapter.config.modules:
        delta = adapter.config.scaling * adapter.tensors[key_b(path)] @ adapter.tensors[key_a(path)]
        with torch.no_grad():
            model.get_submodule(path).weight += torch.from_numpy(delta)
    return model


def test_adapters_of_any_rank_scaling_and_modules_stand_side_by_side_with_their_own_logits():
    base = tiny_base("llama")
    adapters = [None, *different_adapters(base)]
    config, tensors = side_by_side(adapters)
    ids_NT, attention_NT = padded([7, 7, 7, 7])
    with torch.no_grad():
        wanted = [base.model(input_ids=ids_NT[:1], attention_mask=attention_NT[:1]).logits]
        for row, adapter in enumerate(adapters[1:], start=1):
            one = slice(row, row + 1)
            wanted.append(merged(base, adapter)(input_ids=ids_NT[one], attention_mask=attention_NT[one]).logits)
        layers = LoraLayers(base.model, config, len(adapters), dtype=torch.float64)
        for slot, values in enumerate(tensors):
            layers.load(slot, values)
        with layers.routed(range(len(adapters))):
            found = base.model(input_ids=ids_NT, attention_mask=attention_NT).logits
        layers.detach()
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-10, rtol=0)
    assert config.rank == 5


def test_an_adapter_whose_scaling_is_a_power_of_two_keeps_its_bits():
    adapter = random_adapter(tiny_base("llama"), rank=2, alpha=4, dtype="float32")
    _, (values,) = side_by_side([adapter])
    for path in adapter.config.modules:
        assert np.array_equal(values[key_a(path)], adapter.tensors[key_a(path)])
        assert np.array_equal(values[key_b(path)], 2 * adapter.tensors[key_b(path)])
        assert values[key_b(path)].dtype == np.float32


def test_a_scaling_of_zero_silences_an_adapter():
    adapter = random_adapter(tiny_base("llama"))
    muted = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, alpha=0.0))
    _, (values,) = side_by_side([muted])
    assert not any(value.any() for key, value in values.items() if "lora_B" in key)


# Steps and draws ----------------------------------------------------------------------------------


def test_each_step_tells_the_new_token_of_every_answer_that_goes_on():
    base = tiny_base("llama")
    free = generate(base, PROMPTS, 12, batch_size=3)
    stop, heard, live = free[0][4], collections.defaultdict(list), []

    def on_step(tokens):
        live.append(set(tokens))
        for number, token in tokens.items():
            heard[number].append(token)

    answers = generate(base, PROMPTS, 12, batch_size=3, stop=[stop], on_step=on_step)
    assert [heard[number] for number in range(len(PROMPTS))] == answers
    assert any(now < before for before, now in itertools.pairwise(live)), "none ended before the others"


def test_what_a_listener_raises_ends_the_generation():
    steps = []

    def on_step(tokens):
        steps.append(tokens)
        if len(steps) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        generate(tiny_base("llama"), PROMPTS[:2], 50, batch_size=2, on_step=on_step)
    assert len(steps) == 3


def nucleus(logits_V, temperature, top_p):
    """The probabilities that are left, by the definition: the smallest set of likeliest tokens that reaches top-p."""
    scaled = np.asarray(logits_V, np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    left = np.zeros_like(probabilities)
    left[kept] = probabilities[kept] / probabilities[kept].sum()
    return left


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.5, 0.6)])
def test_tokens_are_drawn_with_the_probabilities_of_the_definition(temperature, top_p):
    base, prompt, draws = tiny_base("llama"), [1, 40, 41, 42], 400
    base.model.lm_head.weight *= 3  # so that few tokens have most of the probability
    wanted_V = nucleus(base.model(input_ids=torch.tensor([prompt])).logits[0, -1].numpy(), temperature, top_p)
    counts_V = np.zeros_like(wanted_V)
    for seed in range(draws):
        (answer,) = generate(base, [prompt], 1, 1, sampling=Sampling(temperature, top_p, seed))
        counts_V[answer[0] if answer else 2] += 1
    assert not counts_V[wanted_V == 0].any()
    likely = wanted_V * draws >= 5
    assert likely.sum() > 2
    expected = np.append(wanted_V[likely], wanted_V[~likely].sum()) * draws
    found = np.append(counts_V[likely], counts_V[~likely].sum())
    from scipy.stats import chi2

    statistic = ((found - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    assert statistic < chi2.ppf(0.9999, len(expected) - 1)


def test_draws_depend_on_the_seed_alone_and_leave_the_global_generator_as_it_was():
    base, sampling = tiny_base("llama"), Sampling(1.0, 1.0, 5)
    before = torch.random.get_rng_state()
    together = generate(base, PROMPTS, 8, batch_size=5, sampling=sampling)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert generate(base, PROMPTS, 8, batch_size=2, sampling=sampling) == together
    assert [generate(base, [prompt], 8, 1, sampling=sampling)[0] for prompt in PROMPTS] == together
    assert generate(base, PROMPTS, 8, batch_size=5, sampling=Sampling(1.0, 1.0, 6)) != together


@pytest.mark.parametrize("sampling", [Sampling(1e-6), Sampling(1.0, 1e-9)])
def test_the_coldest_draw_and_the_smallest_nucleus_are_greedy(sampling):
    base = tiny_base("llama")
    assert generate(base, PROMPTS, 8, 5, sampling=sampling) == [greedy(base, prompt, 8) for prompt in PROMPTS]


CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    + "{% if add_generation_prompt %}[assistant] {% endif %}"
)

# A conversation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_talk(tiny_run):
    return open_talk(tiny_run[0])


@pytest.fixture(scope="module")
def crowd(tiny_talk):
    """The tiny run's base with four adapters of different make."""
    recipe = tiny_talk.recipe
    kinds = [{"rank": 2, "alpha": 4}, {"rank": 4, "alpha": 6}, {"rank": 3, "alpha": 3, "target_modules": ["q_proj"]}]
    tuned = [random_adapter(tiny_talk.base, seed=seed, dtype="float32", **kind) for seed, kind in enumerate(kinds)]
    named = {"base": None, **{f"local, client-{number:02}": one for number, one in enumerate(tuned, start=1)}}
    answerers = {name: Answerer(name, recipe, adapter) for name, adapter in named.items()}
    return dataclasses.replace(tiny_talk, answerers=answerers, templates=dict.fromkeys(answerers))


SHORT = AnswerSettings(max_new_tokens=16)


def last(talk, question, names, settings=SHORT):
    return list(talk.answer(question, names, settings))[-1]


def test_answers_side_by_side_are_those_of_each_alone(crowd):
    for text in ("Task 1?", "Name three colours.", "Task 3? " * 9):
        question = make_question(text, "Note 2." if "1" in text else "")
        together = last(crowd, question, crowd.names)
        alone = [last(crowd, question, [name])[0] for name in crowd.names]
        assert together == alone
        assert len({answer.text for answer in together}) == len(together)


def test_those_who_are_asked_answer_in_the_order_asked(crowd):
    names = ["local, client-02", "base"]
    assert [answer.name for answer in last(crowd, make_question("Task 1?"), names)] == names


@pytest.mark.parametrize(("name", "file"), [("base", "0000.jsonl"), ("federated", "0002.jsonl")])
def test_answers_are_those_that_the_run_scored(tiny_run, tiny_talk, name, file):
    stored = json_lines(tiny_run[0] / "answers" / file)
    rows, note = find_examples(tiny_talk)
    recipe = tiny_talk.recipe
    scored = load_federated(recipe.data, recipe.partition, Randomness(recipe.seed)).test
    assert not note
    assert {row.category for row in rows} == {"brainstorming", "classification", "closed_qa", "creative_writing"}
    for row in rows:
        question = make_question(row.instruction, row.context, row)
        answer = last(tiny_talk, question, tiny_talk.names, AnswerSettings(max_new_tokens=3))[
            tiny_talk.names.index(name)
        ]
        assert answer.text == stored[list(scored).index(row)]["answer"]
        assert question.reference == row.response


def test_answers_arrive_while_they_are_made_and_only_grow(crowd, monkeypatch):
    forward, heard, seen = type(crowd.base.model).forward, threading.Semaphore(), []

    def patient(*args, **values):
        heard.acquire(timeout=60)
        return forward(*args, **values)

    with monkeypatch.context() as patch:
        patch.setattr(type(crowd.base.model), "forward", patient)
        for answers in crowd.answer(make_question("Task 1?"), crowd.names, AnswerSettings(max_new_tokens=12)):
            seen.append(answers)
            heard.release()
    assert len(seen) > 5
    for before, now in itertools.pairwise(seen):
        assert all(one.tokens <= other.tokens for one, other in zip(before, now, strict=True))
        assert all(other.text.startswith(one.text.rstrip()) for one, other in zip(before, now, strict=True))
    assert seen[-1] == last(crowd, make_question("Task 1?"), crowd.names, AnswerSettings(max_new_tokens=12))


def test_who_stops_listening_stops_the_answers(crowd, monkeypatch):
    forward, steps, over = type(crowd.base.model).forward, [], threading.Event()

    class Stopped(threading.Event):
        def set(self):
            super().set()
            over.set()

    def counted(*args, **values):
        steps.append(1)
        assert len(steps) == 1 or over.wait(60)  # the second step is not done before nobody listens any more
        return forward(*args, **values)

    monkeypatch.setattr(talking, "threading", SimpleNamespace(Thread=threading.Thread, Event=Stopped))
    monkeypatch.setattr(type(crowd.base.model), "forward", counted)
    stream = crowd.answer(make_question("Task 1?"), crowd.names, AnswerSettings(max_new_tokens=300))
    next(stream)
    stream.close()
    assert len(steps) <= 2
    # The next question is answered when the one before has come to rest.
    last(crowd, make_question("Task 1?"), ["base"], AnswerSettings(max_new_tokens=2))
    assert len(steps) <= 2 + 2


@pytest.mark.parametrize("heard", ["all", "one step"])
def test_no_thread_goes_on_when_an_answer_is_over(crowd, heard):
    before = set(threading.enumerate())
    stream = crowd.answer(
        make_question("Task 1?"), crowd.names, AnswerSettings(max_new_tokens=300 if heard != "all" else 4)
    )
    collections.deque(stream, maxlen=0) if heard == "all" else next(stream)
    stream.close()
    assert set(threading.enumerate()) <= before


# A process for each way to end, forked before anything is computed, ends as Python ends.
ENDINGS = """
import os
import sys
from pathlib import Path
import transformers.models.llama.modeling_llama
from bellwether.ask.questions import AnswerSettings, make_question
from bellwether.ask.talk import open_talk

for how in ("finished", "stopped"):
    child = os.fork()
    if not child:
        break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(how, code)
else:
    sys.exit()
talk, settings = open_talk(Path(sys.argv[1])), AnswerSettings(max_new_tokens=200)
stream = talk.answer(make_question("Task 1?"), ["federated"], settings)
next(stream)
if how == "finished":
    list(stream)
else:
    stream.close()
"""


def test_a_program_ends_in_order_right_after_an_answer_that_is_finished_or_stopped(tiny_run):
    command = [sys.executable, "-c", ENDINGS, str(tiny_run[0])]
    done = subprocess.run(command, capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.split() == [b"finished", b"0", b"stopped", b"0"]


def test_an_answer_says_whether_it_came_to_its_end(crowd):
    question, name = make_question("Task 1?"), "local, client-01"
    (cut,) = last(crowd, question, [name], AnswerSettings(max_new_tokens=4))
    assert (cut.tokens, cut.ended) == (4, False)
    # The last token of the answer, made an end of it.
    ended = dataclasses.replace(crowd, base=dataclasses.replace(crowd.base, stop_ids=(2, all_ids(crowd, name)[3])))
    (answer,) = last(ended, question, [name], AnswerSettings(max_new_tokens=50))
    assert answer.ended
    assert answer.tokens <= 3


def all_ids(talk, name):
    """The ids of somebody's answer to the first question."""
    ids = []
    layers = LoraLayers(talk.base.model, talk.answerers[name].adapter.config)
    layers.load(0, talk.answerers[name].adapter.tensors)
    (ids,) = generate(talk.base, [talk.prompt(name, make_question("Task 1?"))], 4, 1)
    layers.detach()
    return ids


def test_drawn_answers_do_not_depend_on_who_else_is_asked(crowd):
    settings, question = AnswerSettings(temperature=1.2, top_p=0.9, max_new_tokens=16, seed=3), make_question("Task 1?")
    together = last(crowd, question, crowd.names, settings)
    assert together == [last(crowd, question, [name], settings)[0] for name in crowd.names]
    other = dataclasses.replace(settings, seed=4)
    assert [one.text for one in last(crowd, question, crowd.names, other)] != [one.text for one in together]


def test_each_is_asked_with_its_own_template(crowd):
    crowd.base.tokenizer.chat_template = CHAT
    try:
        templates = {**crowd.templates, "local, client-02": chat(crowd.base.tokenizer)}
        mixed = dataclasses.replace(crowd, templates=templates)
        question = make_question("Task 1?")
        asked = {name: crowd.base.tokenizer.decode(mixed.prompt(name, question)) for name in mixed.names}
        assert asked["local, client-02"].endswith("[user] Task 1?\n[assistant] ")
        assert asked["base"].endswith("### Instruction:\nTask 1?\n\n### Response:\n")
        together = last(mixed, question, mixed.names)
        assert together == [last(mixed, question, [name])[0] for name in mixed.names]
    finally:
        crowd.base.tokenizer.chat_template = None


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "context", "sentence"),
    [
        ("", "", "the instruction is empty"),
        (" \n\t", "a text", "the instruction is empty"),
        pytest.param("x" * 1_000_001, "", r"the instruction has 1,000,001 characters; give at most 1,", id="long"),
        pytest.param(
            "Why?", "é" * 1_000_001, r"the context has 1,000,001 characters; give at most 1,000,", id="longer"
        ),
        ("Clear\x1b[2J", "", r"the instruction holds the control character U\+001B"),
        ("Why?", "a\x00b", r"the context holds the control character U\+0000"),
        ("half \ud83d", "", r"the instruction holds the control character U\+D83D"),
        ("Why?</s>", "", "the question has '</s>', which the tokenizer takes for a special token"),
        ("Why? " * 600, "", r"the question takes [\d,]+ tokens with its prompt, but .* has 512 positions; shorten"),
    ],
)
def test_bad_questions_are_refused_in_a_sentence(crowd, instruction, context, sentence):
    with pytest.raises(DataError, match=sentence):
        crowd.answer(make_question(instruction, context), ["base"], AnswerSettings())


def test_markup_other_scripts_and_marks_of_direction_are_text(crowd):
    text = "<script>alert(1)</script> שלום \u202e مرحبا 👩‍🚒\r\nnext"
    question = make_question(f"  {text} ")
    assert question.instruction == text.replace("\r\n", "\n")
    assert text.replace("\r\n", "\n") in crowd.base.tokenizer.decode(crowd.prompt("base", question))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top-p is 0"),
        ({"top_p": 1.1}, "top-p is 1.1"),
        ({"max_new_tokens": 0}, "max-new-tokens is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(crowd, change, sentence):
    with pytest.raises(RecipeError, match=sentence):
        crowd.answer(make_question("Task 1?"), ["base"], AnswerSettings(**change))
    check_settings(AnswerSettings())


def test_nobody_and_strangers_cannot_be_asked(crowd):
    with pytest.raises(RecipeError, match="nobody is asked"):
        crowd.answer(make_question("Task 1?"), [], AnswerSettings())
    with pytest.raises(RecipeError, match="nobody here is called 'nobody'; there are 'base', 'local, client-01'"):
        crowd.answer(make_question("Task 1?"), ["base", "nobody"], AnswerSettings())


# Opening ------------------------------------------------------------------------------------------


def test_who_stands_over_another_base_is_left_out_with_a_note(tiny_run, tiny_talk, monkeypatch):
    recipe = tiny_talk.recipe
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "elsewhere"})})
    found = [*tiny_talk.answerers.values(), Answerer("large", other, tiny_talk.answerers["federated"].adapter)]
    monkeypatch.setattr(talking, "find_answerers", lambda *_, **__: found)
    talk = open_talk(tiny_run[0])
    assert talk.names == ["base", "federated"]
    assert talk.notes == ["Left out, since they stand over another base or load it otherwise: large."]


def test_an_adapter_alone_and_a_model_alone_can_be_asked(tiny_run, tiny_llama):
    alone = open_talk(tiny_run[0] / "adapter")
    assert alone.names == ["base", "adapter"]
    assert "adapter does not name the data" in find_examples(alone)[1]
    assert open_talk(tiny_llama).names == ["base"]
    assert last(open_talk(tiny_llama), make_question("Task 1?"), ["base"])[0].tokens > 0


def test_the_base_may_have_moved(tiny_run, tiny_llama, tmp_path):
    import shutil

    shutil.copytree(tiny_llama, tmp_path / "moved")
    shutil.copytree(tiny_run[0], tmp_path / "run")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.replace(str(tiny_llama), str(tmp_path / "gone")))
    with pytest.raises(Exception, match="gone"):
        open_talk(tmp_path / "run")
    talk = open_talk(tmp_path / "run", model=str(tmp_path / "moved"), device="cpu")
    assert talk.base.name == str(tmp_path / "moved")


def test_data_that_is_gone_leaves_no_examples_and_a_note(tiny_run, tiny_talk, dolly_like, monkeypatch):
    recipe = tiny_talk.recipe
    gone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": ("gone.jsonl",)})})
    talk = dataclasses.replace(tiny_talk, answerers={"base": Answerer("base", gone, None)})
    rows, note = find_examples(talk)
    assert rows == []
    assert note.startswith("There are no examples, since the data cannot be read: ")
    assert "gone.jsonl" in note


def test_rows_that_cannot_be_asked_are_no_examples(tiny_talk, tmp_path):
    rows = [
        {"instruction": text, "response": "So.", "category": "odd"}
        for text in ("Why?", "Clear\u001b[2J", "Long " * 600, "Markup <b>")
    ]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_talk.recipe
    data = recipe.data.model_copy(update={"test_sources": (str(path),), "test_rows_per_category": 0})
    base = Answerer("base", recipe.model_copy(update={"data": data}), None)
    found, note = find_examples(dataclasses.replace(tiny_talk, answerers={"base": base}))
    assert [row.instruction for row in found] == ["Why?", "Markup <b>"], note


def in_arms(arms):
    """Those who can be asked of a comparison, by arm and client."""
    asked = {(arm, client): ", ".join(filter(None, (arm, client))) for arm, client in arms}
    return [Answerer(name, None, None, arm=arm, client=client) for (arm, client), name in asked.items()]


def test_at_first_one_of_each_arm_answers_and_the_federated_one_among_them():
    locals_ = [("local", f"client-{number:02}") for number in range(1, 11)]
    assert first_asked(in_arms([("base", ""), *locals_, ("centralized", ""), ("federated", "")])) == [
        "base", "local, client-01", "centralized", "federated",
    ]  # fmt: skip
    many = ["base", "a", "b", "c", "d", "federated"]
    assert first_asked([Answerer(name, None, None) for name in many]) == ["base", "a", "b", "federated"]
    assert first_asked([Answerer("base", None, None)]) == ["base"]


def test_an_arm_with_a_comma_in_its_name_is_an_arm_of_its_own():
    arms = [("lora, rank 2", ""), ("lora, rank 4", ""), ("alone, long", "client-01"), ("alone, long", "client-02")]
    assert first_asked([Answerer("base", None, None), *in_arms(arms)]) == [
        "base", "lora, rank 2", "lora, rank 4", "alone, long, client-01",
    ]  # fmt: skip


# Keeping ------------------------------------------------------------------------------------------


def test_a_conversation_is_kept_with_all_that_made_it(crowd):
    question, settings = (
        make_question("Wie heißt </script>?", "Köln"),
        AnswerSettings(temperature=0.5, max_new_tokens=4, seed=9),
    )
    names = ["base", "local, client-02"]
    exchange = talking.Exchange(question, settings, last(crowd, question, names, settings))
    kept = json.loads(conversation(crowd, [exchange]))
    assert kept["base"] == {"name": crowd.base.name, "sha256": crowd.base.fingerprint}
    assert kept["templates"] == {"base": "alpaca", "local, client-02": "alpaca"}
    (one,) = kept["exchanges"]
    assert one["question"] == {"instruction": "Wie heißt </script>?", "context": "Köln", "reference": ""}
    assert one["settings"] == {"temperature": 0.5, "top_p": 1.0, "max_new_tokens": 4, "seed": 9}
    assert [answer["name"] for answer in one["answers"]] == names
    assert [answer["tokens"] for answer in one["answers"]] == [4, 4]


def test_an_adapter_for_another_model_is_refused_before_anything_is_asked(tiny_llama, tmp_path):
    adapter = random_adapter(tiny_base("opt"), dtype="float32")
    for name, content in adapter_files(adapter).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception, match="which LlamaForCausalLM does not have"):
        open_talk(Path(tmp_path), model=str(tiny_llama))
