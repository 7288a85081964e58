"""Captions and their way back: `caption` says a part of what is seen, `parse` turns a prompt into attributes again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hiperlab.world.draw import Picture, render
from hiperlab.world.identity import Identity
from hiperlab.world.scene import Scene, scene
from hiperlab.world.vocabulary import (
    ACCESSORIES,
    CLOSE,
    COLOURED,
    COLOURS,
    KINDS,
    LIGHTS,
    PATTERNS,
    PLACES,
    POSES,
    SPOKEN,
    STYLES,
)

SUBJECT = "\0"  # stands for the placeholder once it is found
FILLERS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "and",
        "is",
        "that",
        "with",
        "wearing",
        "in",
        "on",
        "at",
        "picture",
        "image",
        "rendering",
        "depiction",
        "my",
    ]
)
# what a prompt that says nothing means
PLAIN: dict[str, Any] = {"style": "photo", "accessory": "none", "light": "day", "close": False}
PATTERN_SAID = 0.6  # how likely a caption says the pattern of a coat


def _table() -> dict[tuple[str, ...], tuple[str, Any]]:
    """Every phrase, as a tuple of words, with the attribute and value it names."""
    table: dict[tuple[str, ...], tuple[str, Any]] = {(kind,): ("kind", kind) for kind in KINDS}
    groups: list[tuple[str, Mapping[str, tuple[str, ...]]]] = [("pose", POSES), ("place", PLACES), ("style", STYLES)]
    for attribute, values in [*groups, ("accessory", ACCESSORIES), ("light", LIGHTS)]:
        for value, phrases in values.items():
            table |= {tuple(phrase.split()): (attribute, value) for phrase in phrases}
    table |= {tuple(phrase.split()): ("close", True) for phrase in CLOSE}
    table |= {(word,): ("colour", word) for word in COLOURS}
    table |= {(word,): ("pattern", word) for word in PATTERNS}
    return table | {("grey",): ("colour", "gray"), (SUBJECT,): ("subject", True)}


TABLE = _table()
LONGEST = max(map(len, TABLE))


def article(words: str) -> str:
    """The words with their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(who: Identity, now: Scene, rng: np.random.Generator, pattern: float = PATTERN_SAID) -> str:
    """One wording of a picture: always its kind, often pose and place, sometimes a colour; never the whole identity.

    Style, accessory, light and close-up stay unsaid only where they are the plain ones (`PLAIN`), so that a prompt
    that is silent about them means the plain picture.

    Args:
        who: the subject.
        now: its scene.
        rng: decides the wording.
        pattern: how likely a coat's pattern is said, in [0, 1]; where it is always said, silence means a plain coat.
    """
    return caption_parts(who, now, rng, pattern=pattern)[0]


def caption_two(
    left: Identity,
    right: Identity,
    now: Scene,
    rng: np.random.Generator,
    subject: str | None = None,
    pattern: float = PATTERN_SAID,
) -> str:
    """One wording of a picture of two subjects, the left one first; style, place and light as in `caption`.

    Args:
        left: the subject that is named first.
        right: the other one.
        now: the scene of both.
        rng: decides the wording.
        subject: what to write instead of kind, colour and pattern of the left one, its article included.
        pattern: as in `caption`.
    """
    unused: dict[str, Any] = {}
    nouns = [article(_noun(who, rng, unused, pattern)) for who in (left, right)]
    if subject is not None:
        nouns[0] = subject
    text = _head(now, rng, unused) + (" and " if rng.random() < 0.6 else " next to ").join(nouns)
    tail = [_say("place", now.place, PLACES[now.place], rng, unused)] if rng.random() < 0.88 else []
    if now.light != "day" or rng.random() < 0.12:
        tail.append(_say("light", now.light, LIGHTS[now.light], rng, unused))
    return " ".join([text, *tail])


def caption_parts(
    who: Identity, now: Scene, rng: np.random.Generator, subject: str | None = None, pattern: float = PATTERN_SAID
) -> tuple[str, dict[str, Any]]:
    """A caption and the attributes it names, in the form `parse` returns them.

    Args:
        who: the subject.
        now: its scene.
        rng: decides the wording.
        subject: a placeholder to write instead of kind, colour and pattern.
        pattern: as in `caption`.
    """
    named: dict[str, Any] = {}
    noun = subject or _noun(who, rng, named, pattern)
    head = _head(now, rng, named)
    text = head + (noun if subject else article(noun))
    tail = []
    if rng.random() < 0.88:
        tail.append(_say("pose", now.pose, POSES[now.pose], rng, named))
    if now.accessory != "none":
        tail.append(_worn(now, rng, named))
    if rng.random() < 0.88:
        tail.append(_say("place", now.place, PLACES[now.place], rng, named))
    if now.light != "day" or rng.random() < 0.12:
        tail.append(_say("light", now.light, LIGHTS[now.light], rng, named))
    if len(tail) > 1 and rng.random() < 0.15:  # "..., at night" may also come before the place
        tail[-1], tail[-2] = tail[-2], tail[-1]
    return " ".join([text, *tail]), named


def _say(attribute: str, value: str, phrases: tuple[str, ...], rng: np.random.Generator, named: dict[str, Any]) -> str:
    """One of the usual phrases for a value, the canonical one most often; notes that it was named."""
    named[attribute] = value
    return phrases[0] if rng.random() < 0.6 else phrases[int(rng.integers(min(SPOKEN, len(phrases))))]


def _noun(who: Identity, rng: np.random.Generator, named: dict[str, Any], pattern: float) -> str:
    words = [who.kind]
    named["kind"] = who.kind
    if who.pattern != "plain" and rng.random() < pattern:
        words.insert(0, who.pattern)
        named["pattern"] = who.pattern
    if rng.random() < 0.5:
        words.insert(0, who.colour)
        named["colours"] = (who.colour,)
    return " ".join(words)


def _head(now: Scene, rng: np.random.Generator, named: dict[str, Any]) -> str:
    if now.close:
        named["close"] = True
    elif now.style == "photo" and rng.random() < 0.3:
        return ""
    style = _say("style", now.style, STYLES[now.style], rng, named)
    return article(("close-up " if now.close else "") + style) + " of "


def _worn(now: Scene, rng: np.random.Generator, named: dict[str, Any]) -> str:
    thing = _say("accessory", now.accessory, ACCESSORIES[now.accessory], rng, named)
    if now.accessory in COLOURED and rng.random() < 0.7:
        named["accessory_colour"] = now.accessory_colour
        thing = f"{now.accessory_colour} {thing}"
    verb = "wearing" if rng.random() < 0.8 else "with"
    return f"{verb} {thing if now.accessory == 'glasses' else article(thing)}"


def parse(prompt: str, placeholder: str | None = None, kind: str | None = None) -> dict[str, Any]:
    """The attributes a prompt names.

    Args:
        prompt: words of the world's grammar in any order; unknown ones are reported, never guessed.
        placeholder: the string that stands for a personal subject ("<cat>").
        kind: the kind of that subject; returned as "kind" unless the prompt names another.

    Returns:
        Any of pose, place, style, accessory, accessory_colour, light, close, kind, pattern, colours (a tuple) that
        were named, and always "subject" (whether the placeholder occurs) and "unparsed" (a tuple of words).
    """
    found: dict[str, Any] = {"subject": False}
    colours: list[str] = []  # waiting for the noun they belong to
    patterns: list[str] = []
    unparsed: list[str] = []
    for attribute, value, words in _matches(_words(prompt, placeholder)):
        if attribute == "colour":
            colours.append(value)
        elif attribute == "pattern":
            patterns.append(value)
        elif attribute in ("kind", "subject"):
            if found.get(attribute):
                unparsed += words  # a second subject: the world has one
                continue
            found[attribute] = value
            found |= ({"colours": tuple(colours)} if colours else {}) | ({"pattern": patterns[-1]} if patterns else {})
            unparsed += patterns[:-1]
            colours, patterns = [], []
        elif attribute == "accessory" and attribute not in found:
            found[attribute] = value
            if colours and value in COLOURED:
                found["accessory_colour"] = colours.pop()
            unparsed += colours
            colours = []
        elif attribute == "unknown" or attribute in found:
            unparsed += words
        else:
            found[attribute] = value
    if kind and "kind" not in found:
        found["kind"] = kind
    found["unparsed"] = tuple(unparsed + colours + patterns)
    return found


def _words(prompt: str, placeholder: str | None) -> list[str]:
    text = prompt.replace(placeholder, f" {SUBJECT} ") if placeholder else prompt
    return re.findall(rf"{SUBJECT}|[\w<>*{{}}'-]+", text.lower())


def _matches(words: list[str]) -> Iterator[tuple[str, Any, list[str]]]:
    """Longest known phrases from left to right; fillers are skipped, other words come as "unknown"."""
    i = 0
    while i < len(words):
        for n in range(min(LONGEST, len(words) - i), 0, -1):
            known = TABLE.get(tuple(words[i : i + n]))
            if known:
                yield (*known, words[i : i + n])
                break
        else:
            n = 1
            if words[i] not in FILLERS:
                yield "unknown", None, [words[i]]
        i += n


def true_scene(prompt: str, seed: int, placeholder: str | None = None) -> Scene:
    """The scene a prompt asks for: named attributes as named, silent ones plain, pose, place and camera by the seed."""
    said = parse(prompt, placeholder)
    return scene(seed, **PLAIN | {k: v for k, v in said.items() if k in Scene.__dataclass_fields__})


def true_identity(who: Identity, prompt: str, placeholder: str | None = None) -> Identity:
    """The subject as the prompt wants it: recoloured, repatterned or of another kind where it says so."""
    said = parse(prompt, placeholder)
    changes: dict[str, Any] = {}
    if said.get("kind", who.kind) != who.kind:
        changes["kind"] = said["kind"]
    if said.get("pattern", who.pattern) != who.pattern:
        changes["pattern"] = said["pattern"]
    colours = said.get("colours", ())
    if colours and colours[0] != who.colour:
        changes |= {"colour": colours[0], "coat": COLOURS[colours[0]]}
    return replace(who, **changes)


def true_picture(who: Identity, prompt: str, seed: int, size: int, placeholder: str | None = None) -> Picture:
    """The truth for a prompt about a subject.

    Args:
        who: the subject the placeholder stands for.
        prompt: for example "a photo of <cat> jumping in the snow".
        seed: of what the prompt leaves open.
        size: side in pixels.
        placeholder: "<cat>"; without one the prompt's own noun is the subject.
    """
    return render(true_identity(who, prompt, placeholder), true_scene(prompt, seed, placeholder), size)
