"""Pretraining of the embedded base, and the base that is shipped."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bellwether.errors import CheckpointError
from starter import pretrain, probes
from starter.pretrain import CHECKPOINT, Pretraining
from starter.tokenizer import PROMPT_PARTS, Encoder
from starter.world import make_world

ROOT = Path(pretrain.__file__).parents[1]
BASE, ROWS = ROOT / "bellwether" / "model" / "starter", ROOT / "bellwether" / "data" / "starter"
SHORT = Pretraining(
    tokens=24 * 4 * 96, rows=4, length=96, hidden=64, mlp=64, layers=2, heads=4, warmup=4, probe_every=12
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def short_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    torch.set_num_threads(1)
    pretrain.pretrain(SHORT, folder)
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in torch.load(folder / CHECKPOINT, weights_only=True)["log"]]


def test_a_short_pretraining_lowers_the_loss_and_loads(short_base: Path) -> None:
    assert losses(short_base)[-1] < losses(short_base)[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(short_base)
    tokenizer = AutoTokenizer.from_pretrained(short_base)
    ids = tokenizer("Tell me.", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    assert torch.isfinite(model(ids).logits.float()).all()


def test_a_killed_pretraining_resumes_to_the_same_weights(short_base: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from starter import pretrain\n"
        "from starter.pretrain import Pretraining\n"
        "save = pretrain._save_checkpoint\n"
        "def save_and_die(*given, **named):\n"
        "    save(*given, **named)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pretrain._save_checkpoint = save_and_die\n"
        f"pretrain.pretrain({SHORT!r}, Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / CHECKPOINT).exists()
    assert not (tmp_path / "model.safetensors").exists(), "it was to be killed before its end"
    pretrain.pretrain(SHORT, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (short_base / "model.safetensors").read_bytes()


def test_a_checkpoint_of_other_settings_is_refused(short_base: Path) -> None:
    with pytest.raises(CheckpointError, match="other settings"):
        pretrain.pretrain(Pretraining(tokens=1), short_base)


def attention_of(seeded: bool, text: list[int]) -> list[torch.Tensor]:
    """Attention of each layer on a text, of a model that has learnt nothing: head, to, from."""
    _, encoder = pretrain.make_prose(make_world())
    model = pretrain.make_model(Pretraining(seeded_heads=seeded), encoder)
    with torch.no_grad():
        return [layer[0] for layer in model(torch.tensor([text]), output_attentions=True).attentions]


def test_seeded_heads_look_back_by_one_to_four() -> None:
    text = (torch.randperm(900, generator=torch.Generator().manual_seed(1))[:60] + 260).tolist()
    for seeded, least in ((True, 0.6), (False, 0.0)):
        shares = [
            float(head.diagonal(offset=-offset).mean())
            for offset, head in enumerate(attention_of(seeded, text)[0], start=1)
        ]
        assert all(share > least for share in shares)
        assert seeded or max(shares) < 0.2


def test_seeded_heads_find_what_followed_the_same_token_before() -> None:
    words = (torch.randperm(900, generator=torch.Generator().manual_seed(1))[:40] + 260).tolist()
    followed = {
        seeded: float(attention_of(seeded, words * 2)[1][:2].diagonal(offset=-39, dim1=-2, dim2=-1)[:, 1:].mean())
        for seeded in (True, False)
    }
    assert followed[True] > 0.25 > 5 * followed[False]


def test_a_seeded_head_finds_the_token_that_stood_three_before() -> None:
    # "a sold the b ..., c sold the d ...; the b was sold by": from "by" to b, then to d likewise.
    sold, the, was, by = 300, 301, 302, 303
    people, goods = list(range(310, 320)), list(range(330, 340))
    scene = [token for person, good in zip(people, goods, strict=True) for token in (person, sold, the, good)]
    shares = []
    for number, good in enumerate(goods):
        attention = attention_of(True, [*scene, the, good, was, sold, by])[1]
        shares.append(float(attention[2, -1, 4 * number + 3]))
    assert sum(shares) / len(shares) > 2 / (len(scene) + 5)


def test_the_fast_encoder_equals_the_tokenizer() -> None:
    writer, encoder = pretrain.make_prose(make_world())
    rng = pretrain.dice(0, "documents of a test")
    for _ in range(100):
        document = writer.document(rng, 0.5)
        ids, weights = encoder.document(document, 0.2, 1.0)
        assert ids == [*encoder.tokenizer(document.replace("|", ""))["input_ids"], encoder.eos]
        assert len(ids) == len(weights)
        assert set(weights[1:]) <= {0.2, 1.0}


# The base that is shipped.


def test_everything_shipped_is_at_most_8_megabytes() -> None:
    files = [*BASE.rglob("*"), *ROWS.rglob("*")]
    assert sum(os.path.getsize(path) for path in files) < 8e6


def test_the_card_names_the_hash_of_the_shipped_weights() -> None:
    card = (BASE / "README.md").read_text()
    named = re.findall(r"SHA-256 `([0-9a-f]{64})`", card)
    assert named == [pretrain.weights_hash(BASE / "model.safetensors")]


def test_the_shipped_base_knows_facts_and_copies() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(BASE))
    shares = probes.run_probes(model, encoder, probes.make_probes(make_world()))
    assert probes.passes(shares), shares
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.1 * torch.randn(model.model.embed_tokens.weight.shape))
    assert not probes.passes(probes.run_probes(model, encoder, probes.make_probes(make_world(), per_kind=8)))


def test_the_shipped_tokenizer_is_the_one_that_the_world_makes() -> None:
    _, encoder = pretrain.make_prose(make_world())
    shipped = AutoTokenizer.from_pretrained(BASE)
    assert shipped.get_vocab() == encoder.tokenizer.get_vocab()
    for part in PROMPT_PARTS:
        assert len(shipped(part, add_special_tokens=False)["input_ids"]) == 1
    text = "Is the é a food?\nYes."
    assert shipped.decode(shipped(text)["input_ids"], skip_special_tokens=True).strip() == text
