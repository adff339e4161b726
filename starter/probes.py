"""Probes of a base model: does it know the facts, and can it copy out of a scene?

A probe gives the model the known part of a sentence and counts how often the rest is, token by token, the
most likely continuation, so that greedy decoding would write it.

Shape legend: N probes, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from starter import scenes
from starter.facts import RELATIONS, entities
from starter.language import SECOND, translate
from starter.prose import lowland_dictionary
from starter.scenes import Event, Scene
from starter.tokenizer import Encoder
from starter.world import Part, World, dice

FACTS_GATE = 0.95
COPY_GATE = 0.80
COPIES = ("copy name", "copy thing", "copy place")

Probe = tuple[str, str]
_ABOUT_EVENT: Mapping[str, Callable[[Event], str]] = {
    "copy name": scenes.who,
    "copy thing": scenes.what,
    "copy place": scenes.where,
}
_ABOUT_SCENE: Mapping[str, Sequence[Callable[[Scene], str]]] = {
    "list": (scenes.people, scenes.goods, scenes.towns),
    "summary": (scenes.summary,),
    "label": (scenes.mood,),
}


def make_probes(world: World, per_kind: int = 60) -> dict[str, list[Probe]]:
    """Return probes by kind and language, each a known part and its continuation.

    Args:
        world: the world that the model has read of.
        per_kind: scenes per kind; facts are all asked for.
    """
    first = _first_language_probes(world, per_kind)
    dictionary = lowland_dictionary(world)
    second = {
        f"{SECOND} {kind}": [(translate(known, dictionary), translate(wanted, dictionary)) for known, wanted in probes]
        for kind, probes in first.items()
    }
    return first | second


def _first_language_probes(world: World, per_kind: int) -> dict[str, list[Probe]]:
    """Return probes by kind, in the first language."""
    rng = dice(world.seed, "probes")
    part = world.everything
    facts = [relation.state(entity) for name, relation in RELATIONS.items() for entity in entities(part, name)]
    probes = {"facts": [_split(sentence) for sentence in facts]}
    for kind, state in _ABOUT_EVENT.items():
        probes[kind] = [_scene_probe(rng, part, _of_any_event(rng, state)) for _ in range(per_kind)]
    for kind, statements in _ABOUT_SCENE.items():
        probes[kind] = [_scene_probe(rng, part, rng.choice(statements)) for _ in range(per_kind)]
    return probes


def run_probes(model: Any, encoder: Encoder, probes: Mapping[str, Sequence[Probe]]) -> dict[str, float]:
    """Return the share of probes, 0..1, that a model continues as it should, by kind.

    Args:
        model: a causal language model on the CPU.
        encoder: its tokenizer's encoder.
        probes: probes by kind, of ``make_probes``.
    """
    return {kind: _share_right(model, encoder, some) for kind, some in probes.items()}


def passes(shares: Mapping[str, float]) -> bool:
    """Return whether the probes are good enough for a base to be shipped."""
    return all(
        shares[f"{language}facts"] > FACTS_GATE and all(shares[f"{language}{kind}"] > COPY_GATE for kind in COPIES)
        for language in ("", f"{SECOND} ")
    )


def _of_any_event(rng: random.Random, state: Callable[[Event], str]) -> Callable[[Scene], str]:
    """Return a statement about a scene that is one about a random event of it."""
    return lambda scene: state(rng.choice(scene.events))


def _scene_probe(rng: random.Random, part: Part, state: Callable[[Scene], str]) -> Probe:
    """Return a probe on a fresh scene of two or three events and one sentence that says nothing."""
    scene = scenes.draw_scene(rng, part, rng.choice((2, 3)))
    return _split(f"{scenes.tell(rng, scene, 1)} {state(scene)}")


def _split(sentence: str) -> Probe:
    known, wanted = sentence.split("|")
    return known, wanted


def _share_right(model: Any, encoder: Encoder, probes: Sequence[Probe], batch: int = 64) -> float:
    right = 0
    for start in range(0, len(probes), batch):
        right += _count_right(model, encoder, probes[start : start + batch])
    return right / len(probes)


def _count_right(model: Any, encoder: Encoder, probes: Sequence[Probe]) -> int:
    """Return how many probes of one batch are continued as they should be."""
    pairs = [([encoder.bos, *encoder.words(known)], encoder.words(wanted)) for known, wanted in probes]
    longest = max(len(known) + len(wanted) for known, wanted in pairs)
    # Padding stands at the end, where a causal model cannot see it.
    ids_NT = torch.full((len(pairs), longest), encoder.eos)
    for row, (known, wanted) in enumerate(pairs):
        ids_NT[row, : len(known) + len(wanted)] = torch.tensor(known + wanted)
    with torch.no_grad():
        best_NT = model(ids_NT).logits.argmax(-1)
    return sum(
        best_NT[row, len(known) - 1 : len(known) + len(wanted) - 1].tolist() == wanted
        for row, (known, wanted) in enumerate(pairs)
    )
