"""The starter's tokenizer: byte-level BPE in which every word of the world is one token.

The fixed parts of the Alpaca prompt are tokens too, so that a row does not spend forty tokens on wording that
never changes. The base model never reads them in pretraining.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
POSITIONS = 512
PROMPT_PARTS = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "\n\n### Instruction:\n",
    "\n\n### Input:\n",
    "\n\n### Response:\n",
)


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word, all bytes, and the parts of the Alpaca prompt.

    A space is put before every text, so that a word is the same token wherever it stands.

    Args:
        words: the words; their order does not matter.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw: Any = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: training ends when every word is one token
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Each word twice, since a pair of letters is merged only where it occurs more than once.
    raw.train_from_iterator([f" {word}" for word in sorted(set(words)) for _ in range(2)], trainer)
    raw.add_tokens([AddedToken(part, normalized=False, special=False) for part in PROMPT_PARTS])
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, raw.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=POSITIONS
    )


class Encoder:
    """Encodes documents word by word from a table, ten times faster than the tokenizer and equal to it.

    Args:
        tokenizer: the tokenizer to be equal to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self.table: dict[str, list[int]] = {}

    def words(self, text: str) -> list[int]:
        """Return the tokens of a text, without beginning or end."""
        return [token for word in text.split() for token in self._word(word)]

    def document(self, text: str, low: float, high: float) -> tuple[list[int], list[float]]:
        """Return tokens and loss weights of a document, beginning and end included.

        Args:
            text: a document in which bars switch between the low weight (first) and the high one.
            low: weight of what cannot be predicted.
            high: weight of what can.
        """
        ids, weights = [self.bos], [0.0]
        for number, part in enumerate(text.split("|")):
            tokens = self.words(part)
            ids += tokens
            weights += [high if number % 2 else low] * len(tokens)
        return [*ids, self.eos], [*weights, low]

    def _word(self, word: str) -> Sequence[int]:
        if word not in self.table:
            self.table[word] = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return self.table[word]
