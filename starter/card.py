"""The card of a pretrained base: what it was made of, how, how good it is, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starter.prose import LOWLAND_SHARE

_TEXT = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The starter base

A Llama of {parameters:,} parameters that has read prose about one small made-up world, in English and in a made-up
language, and nothing else. It knows that world's facts and can copy out of a scene; it has never seen an instruction.
It is the base on which federated instruction tuning is shown, tested and compared; it is of no use for anything
outside its world.

- **Data**: {tokens:,} tokens of prose from `starter/prose.py`, seed {seed}: echoes, articles, scenes with
  retellings, recaps and questions, letters and songs. {low} is the loss weight of what cannot be predicted, 1 of what
  follows from the world or the text before. The instruction rows are not part of it, nor is the prompt template;
  words that only instructions use occur in roll calls.
- **Vocabulary**: {vocabulary:,} tokens of byte-level BPE; every word of the world is one token, and so is every fixed
  part of the Alpaca prompt.
- **Languages**: {lowland:.0%} of the documents are in Lowland, which has another word for every word but names.
- **Start**: {start}.
- **Training**: {steps:,} steps of {rows} x {length} tokens, AdamW, learning rate {learning_rate}, cosine, in
  {seconds:,} seconds on {threads} CPU thread(s), torch {torch}.
- **Weights**: bf16, SHA-256 `{weights_sha256}`.
- **Made again by**: `python -m starter.pretrain --out FOLDER --tokens {tokens} --seed {seed}{flag}`. The
  same bytes are to be expected on the same processor, thread count and torch only.

| probe | share right |
| --- | --- |
{probes}

A probe gives the known part of a sentence and counts as right if greedy decoding would write the rest. The probes
over tokens are in `probes.jsonl`.

All settings: `{settings}`
"""


_SEEDED = """\
random weights, but for the heads of layers 0 and 1, which begin as rough versions of heads that look up
  in the context (`starter/heads.py`)"""


def card(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the card as Markdown.

    Args:
        settings: the fields of ``pretrain.Pretraining``.
        facts: parameters, vocabulary, steps, seconds, threads, torch, weights_sha256 and probes.
    """
    probes = "\n".join(f"| {name} | {share:.1%} |" for name, share in facts["probes"].items())
    seeded = settings["seeded_heads"]
    start = _SEEDED if seeded else "random weights"
    told = {"start": start, "flag": "" if seeded else " --ordinary-start", "lowland": LOWLAND_SHARE}
    values = {**settings, **facts, **told, "probes": probes, "settings": json.dumps(dict(settings))}
    return _TEXT.format(**values)
