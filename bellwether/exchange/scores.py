"""Scores of answers: texts and sums in, numbers out.

Loss and perplexity are per response token. ROUGE-L is the F measure of Lin (2004) as the
``rouge-score`` package computes it, with stemming, over the words of every script: of ASCII's letters and digits these
are that package's own, to the last digit; see ``words``. An exact match ignores white space at the ends and between
words, and nothing else. Texts that differ in Unicode's form only (a letter and its accent apart or in one) are equal.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from bellwether.tools.json_text import KEPT, Amount, Count, Loss

# Scripts, by their names in Unicode, that put no space between words.
UNSPACED = ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Yi")


@dataclass(frozen=True)
class Totals:
    """Sums over scored rows, which add up over batches, clients and categories.

    Args:
        rows: scored rows.
        tokens: response tokens of those rows.
        loss: cross-entropy summed over those tokens, in nats.
        generated: rows for which an answer was generated.
        rouge_l: ROUGE-L F1, each in 0..1, summed over generated answers.
        exact: generated answers that equal the reference.
        pairs: preference rows among the scored ones; their loss is that of the chosen answer.
        preferred: of these those whose chosen answer has the higher implicit reward, β (log π − log π_ref) with the
            untuned base as π_ref (Rafailov et al. 2023, arXiv 2305.18290), by which trained the model would choose it;
            where both are equal, half a pair.
    """

    __pydantic_config__ = KEPT

    rows: Count = 0
    tokens: Count = 0
    loss: Loss = 0.0
    generated: Count = 0
    rouge_l: Amount = 0.0
    exact: Count = 0
    pairs: Count = 0
    preferred: Amount = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.loss + other.loss,
            self.generated + other.generated,
            self.rouge_l + other.rouge_l,
            self.exact + other.exact,
            self.pairs + other.pairs,
            self.preferred + other.preferred,
        )


@dataclass(frozen=True)
class Scores:
    """Means over scored rows; None where no row counts.

    Args:
        rows: scored rows.
        loss: cross-entropy, in nats per response token.
        rouge_l: ROUGE-L F1, 0..1.
        exact: share of answers that equal the reference, 0..1.
        preferred: share of preference rows whose chosen answer has the higher implicit reward, 0..1; 0.5 is chance, and
            the untuned base's.
    """

    rows: int
    loss: float | None
    rouge_l: float | None
    exact: float | None
    preferred: float | None = None

    @property
    def perplexity(self) -> float | None:
        """The exponential of the loss."""
        return None if self.loss is None else math.exp(min(self.loss, 700.0))


def fraction(totals: Totals, metric: str) -> tuple[float, float] | None:
    """Return numerator and denominator of a score, None where there is none.

    Args:
        totals: of scored rows.
        metric: ``loss``, ``rouge_l``, ``exact`` or ``preferred``.
    """
    counts = {"loss": totals.tokens, "rouge_l": totals.generated, "exact": totals.generated, "preferred": totals.pairs}
    return (float(getattr(totals, metric)), float(counts[metric])) if counts[metric] else None


def add_up(parts: Iterable[tuple[str, Totals]]) -> dict[str, Totals]:
    """Return the sums of totals that have the same name, such as a category, in alphabetical order."""
    sums: dict[str, Totals] = {}
    for name, totals in parts:
        sums[name] = sums.get(name, Totals()) + totals
    return dict(sorted(sums.items()))


def means(totals: Totals) -> Scores:
    """Return the means behind totals."""
    return Scores(
        rows=totals.rows,
        loss=totals.loss / totals.tokens if totals.tokens else None,
        rouge_l=totals.rouge_l / totals.generated if totals.generated else None,
        exact=totals.exact / totals.generated if totals.generated else None,
        preferred=totals.preferred / totals.pairs if totals.pairs else None,
    )


def macro(categories: Mapping[str, Totals]) -> Scores:
    """Return the unweighted mean of the categories' means, so that no large category hides a small one."""
    scores = [means(totals) for totals in categories.values()]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return Scores(
        rows=sum(score.rows for score in scores),
        loss=mean([score.loss for score in scores]),
        rouge_l=mean([score.rouge_l for score in scores]),
        exact=mean([score.exact for score in scores]),
        preferred=mean([score.preferred for score in scores]),
    )


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L F1 of an answer, 0..1."""
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


def exact_match(answer: str, reference: str) -> bool:
    """Return whether an answer equals the reference, white space and Unicode's form aside."""
    return _composed(answer).split() == _composed(reference).split()


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case, as ROUGE compares them.

    A word is a run of letters, digits and marks of any script; of scripts that put no space between words (Chinese and
    Japanese characters, kana, Thai, Lao, Khmer, Burmese, Tibetan) every character is one, with its marks. Words of
    ASCII's letters and digits, of which more than three stand together, are stemmed by Porter's algorithm for English,
    as ``rouge-score`` does; others are not. That package itself knows no letters but ASCII's, and scores texts in other
    scripts 0, also where they are equal.
    """
    found = _word_pattern().findall(_composed(text).lower())
    return [_stem(word) if len(word) > 3 and word.isascii() else word for word in found]


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@functools.cache
def _word_pattern() -> Any:
    import regex

    unspaced = "".join(rf"\p{{{script}}}" for script in UNSPACED)
    return regex.compile(rf"(?V1)[{unspaced}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{unspaced}]]+")


@functools.lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return str(_stemmer().stem(word))


@functools.cache
def _stemmer() -> Any:
    from nltk.stem import PorterStemmer

    return PorterStemmer()


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))
