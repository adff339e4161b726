"""Small tokenizers of every family, trained on the spot, and chat templates."""

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bellwether.data.chat import ChatFormat
from bellwether.data.prompts import resolve_template
from bellwether.recipe.recipe import Data

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nName a colour of the sky.\n\n### Response:\nBlue is a colour of the sky.",
    "### Instruction:\nSum up the text.\n\n### Input:\nThe fox runs over the hill.\n\n### Response:\nA fox runs.",
    "### Response:\nYes.\n### Response:\nThe sky.\n### Response:\nThe fox.\n### Response:\nThe hill.",
] * 5
# Makes "\nThe" one token where nothing splits texts beforehand.
ACROSS = [*CORPUS, *["\nThe"] * 500]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# BOS in the template, contents trimmed, a space before the answer, end of sequence behind it.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system message here') }}{% endif %}{% endfor %}"
)
# As Qwen3's: the last answer carries an empty thought, earlier ones do not, and the prompt only where it is told so.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Nothing marks the end of a turn.
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# The prompt for generation is no beginning of the whole chat.
CONTRARY = "{% if add_generation_prompt %}Go on: {% endif %}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def chat(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> ChatFormat:
    """How a tokenizer's chat template renders chats."""
    found = resolve_template(Data(template="chat", **settings), tokenizer)
    assert found is not None
    return found


def _wrap(backend: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _frame(backend: Tokenizer, frame: str, *tokens: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(token, backend.token_to_id(token)) for token in tokens]
    )


def byte_bpe() -> PreTrainedTokenizerFast:
    """As GPT-2: byte-level BPE, no BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=450, special_tokens=special, initial_alphabet=alphabet)
    )
    return _wrap(backend, eos_token="<|endoftext|>")


def byte_bpe_trimmed(split: bool = True) -> PreTrainedTokenizerFast:
    """As RoBERTa: byte-level BPE with BOS and EOS around, offsets without white space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = CORPUS if split else ACROSS
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=450, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", backend.token_to_id("</s>")), ("<s>", backend.token_to_id("<s>")), True, False
    )
    return _wrap(backend, bos_token="<s>", eos_token="</s>")


def bpe_across() -> PreTrainedTokenizerFast:
    """BPE that nothing splits beforehand, so that tokens lie across line breaks and borders."""
    backend = Tokenizer(models.BPE())
    special = ["<s>", "</s>"]
    backend.train_from_iterator(
        ACROSS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=list("YTBN,:\nqz é🦊空"))
    )
    backend.decoder = decoders.Fuse()
    _frame(backend, "<s> $A", "<s>")
    return _wrap(backend, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    """As Mistral: SentencePiece BPE over words that begin with ▁, with BOS."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        [text.replace("\n", " ") for text in CORPUS], trainers.BpeTrainer(vocab_size=500, special_tokens=special)
    )
    _frame(backend, "<s> $A", "<s>")
    return _wrap(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace_normalised() -> PreTrainedTokenizerFast:
    """As Llama 2: the same, with ▁ put in by the normaliser and nothing split beforehand."""
    tokenizer = metaspace()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """As T5: SentencePiece unigrams, with EOS behind every text."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    )
    _frame(backend, "$A </s>", "</s>")
    return _wrap(backend, eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT: WordPiece, lower case, no white space in tokens, [CLS] and [SEP] around."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    _frame(backend, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return _wrap(backend, cls_token="[CLS]", bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]")


def words(vocabulary: str) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark, numbered as given, for ids worked out by hand."""
    names = ["<unk>", "<s>", "</s>", *vocabulary.split()]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    _frame(backend, "<s> $A", "<s>")
    return _wrap(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


# Family to: how it is made, the tokens that it puts before a text, whether its tokens keep every character.
FAMILIES = {
    "byte-level BPE": (byte_bpe, [], True),
    "byte-level BPE, BOS, trimmed offsets": (byte_bpe_trimmed, ["<s>"], True),
    "byte-level BPE across borders, trimmed": (functools.partial(byte_bpe_trimmed, False), ["<s>"], True),
    "BPE across borders, BOS": (bpe_across, ["<s>"], True),
    "Metaspace, BOS": (metaspace, ["<s>"], True),
    "Metaspace by normaliser, BOS": (metaspace_normalised, ["<s>"], True),
    "unigrams, EOS behind": (unigram, [], False),
    "WordPiece, CLS and SEP": (wordpiece, ["[CLS]"], False),
}


@functools.cache
def family(name: str) -> PreTrainedTokenizerFast:
    return FAMILIES[name][0]()


def with_chat(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Return a copy that has a chat template."""
    import copy

    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied
