"""Phrases of chords from a grammar that is known, so that every phrase has a probability."""

from __future__ import annotations

import io
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from lipgan.data.dataset import Dataset

__all__ = ["CHORDS", "LENGTH", "chords", "entropy", "legal", "log_likelihood", "midi"]

LENGTH = 16
SAMPLES = 10_000
_SEED = 9

#: The name of each chord of C major, and its notes from the bass up, as MIDI numbers (60 is middle C).
CHORDS: dict[str, tuple[int, ...]] = {
    "I": (48, 55, 64, 72),
    "I6": (52, 55, 67, 72),
    "I64": (55, 60, 64, 72),
    "ii": (50, 57, 65, 74),
    "ii6": (53, 57, 62, 74),
    "iii": (52, 59, 67, 71),
    "IV": (53, 60, 65, 69),
    "V": (43, 59, 62, 67),
    "V7": (43, 59, 65, 74),
    "vi": (45, 60, 64, 69),
    "vii6": (50, 59, 65, 71),
}

# What may follow each chord, and how often in 12. A six-four chord leads to a dominant, a dominant not back to where it
# came from; the first chord follows a closing I.
_RULES: dict[str, dict[str, int]] = {
    "I": {"IV": 3, "V": 2, "vi": 2, "ii": 2, "iii": 1, "ii6": 1, "I6": 1},
    "I6": {"IV": 4, "ii6": 4, "V": 2, "vii6": 2},
    "I64": {"V": 6, "V7": 6},
    "ii": {"V": 5, "V7": 3, "vii6": 2, "I64": 2},
    "ii6": {"V": 4, "V7": 3, "I64": 5},
    "iii": {"vi": 7, "IV": 5},
    "IV": {"V": 4, "ii": 2, "I64": 2, "I": 2, "vii6": 2},
    "V": {"I": 7, "vi": 3, "I6": 2},
    "V7": {"I": 9, "vi": 3},
    "vi": {"IV": 4, "ii": 4, "ii6": 2, "iii": 2},
    "vii6": {"I": 8, "I6": 4},
}

_TONIC = list(CHORDS).index("I")
# One beat of a quarter note each, at 100 beats a minute.
_TICKS, _MICROSECONDS, _VELOCITY = 480, 600_000, 72


def _grammar() -> tuple[Tensor, Tensor]:
    """The chances of the first chord ``[k]`` and of chord j at place t after chord i, ``[LENGTH - 1, k, k]``, float64.

    Those of the rules under the condition that the last chord is I: a chain whose chances depend on the place.
    """
    names = list(CHORDS)
    free = torch.zeros(len(names), len(names), dtype=torch.float64)
    for before, after in _RULES.items():
        for name, weight in after.items():
            free[names.index(before), names.index(name)] = weight / 12
    # The probability of a proper end from each chord, by the number of chords that follow.
    ends = [F.one_hot(torch.tensor(_TONIC), len(names)).double()]
    for _ in range(LENGTH - 1):
        ends.append(free @ ends[-1])
    first = free[_TONIC] * ends[LENGTH - 1]
    steps = [free * after / here.clamp_min(1e-300).unsqueeze(1) for here, after in pairwise(reversed(ends))]
    return first / first.sum(), torch.stack(steps)


def chords() -> Dataset:
    """Phrases of 16 chords of C major that end on I, each chord following from the one before by a rule of harmony.

    The rules are a Markov chain on 11 chords, here under the condition of its end; `log_likelihood` is exact.

    Source: the progressions of common practice, as textbooks of harmony tabulate them; the weights are this package's.

    Returns:
        samples ``[10000, 16, 11]``, float32, one-hot; no labels.
    """
    random = torch.Generator().manual_seed(_SEED)
    first, steps = _grammar()
    drawn = [torch.multinomial(first, SAMPLES, replacement=True, generator=random)]
    for step in steps:
        drawn.append(torch.multinomial(step[drawn[-1]].clamp_min(1e-300), 1, generator=random).squeeze(1))
    return Dataset("chords", F.one_hot(torch.stack(drawn, 1), len(CHORDS)).float())


def _chances(phrases: Tensor) -> Tensor:
    """The chance of each chord ``[n, 16]`` given the one before, of phrases ``[n, 16, 11]``: by their largest entries.

    Raises:
        ValueError: phrases of another shape.
    """
    if phrases.ndim != 3 or phrases.shape[1:] != (LENGTH, len(CHORDS)):
        raise ValueError(f"phrases must be [n, {LENGTH}, {len(CHORDS)}], got shape {tuple(phrases.shape)}")
    first, steps = _grammar()
    y = phrases.argmax(2).cpu()
    return torch.stack([first[y[:, 0]], *(step[y[:, t], y[:, t + 1]] for t, step in enumerate(steps))], 1)


def legal(phrases: Tensor) -> Tensor:
    """Which chords ``[n, 16]`` of phrases ``[n, 16, 11]`` the grammar allows at their place after the one before.

    Raises:
        ValueError: phrases of another shape.
    """
    return _chances(phrases) > 0


def log_likelihood(phrases: Tensor, slip: float = 0.01) -> Tensor:
    """The logarithm of the probability of each phrase, ``[n]``, float64, in nats.

    Args:
        phrases: ``[n, 16, 11]``, chords by their largest entries.
        slip: the chance that a chord is any of the 11, each equally likely, whatever the grammar says: without it a
            single slip would make minus infinity. The data have none.

    Raises:
        ValueError: phrases of another shape.
    """
    return ((1 - slip) * _chances(phrases) + slip / len(CHORDS)).log().sum(1)


def entropy() -> float:
    """The entropy of the grammar in nats per phrase: what minus the log likelihood of its phrases is on average."""
    first, steps = _grammar()
    total, at = -float(torch.special.xlogy(first, first).sum()), first
    for step in steps:
        total -= float(at @ torch.special.xlogy(step, step).sum(1))
        at = at @ step
    return total


def midi(phrases: Tensor) -> bytes:
    """Phrases ``[n, 16, 11]`` as a MIDI file: one after the other, a beat for each chord, a bar of rest between them.

    Raises:
        ValueError: phrases of another shape, or the package mido is not installed.
    """
    try:
        import mido  # Needed here only.
    except ImportError as error:
        raise ValueError(f"a MIDI file needs the package mido: pip install mido ({error})") from error
    _chances(phrases)
    notes = list(CHORDS.values())
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=_MICROSECONDS)])
    for phrase in phrases.argmax(2).tolist():
        rest = 4 * _TICKS if len(track) > 1 else 0
        for chord in phrase:
            for kind, wait in (("note_on", rest), ("note_off", _TICKS)):
                for k, note in enumerate(notes[chord]):
                    track.append(mido.Message(kind, note=note, velocity=_VELOCITY, time=wait if k == 0 else 0))
            rest = 0
    buffer = io.BytesIO()
    mido.MidiFile(ticks_per_beat=_TICKS, tracks=[track]).save(file=buffer)
    return buffer.getvalue()
