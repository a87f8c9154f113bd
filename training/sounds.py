"""Sounds: beeps, gliding tones, noise, silence, and a spoken digit."""

import random

import numpy as np

from training.items import Hint, Item, Question
from training.material import RATE, Material
from training.world import MOST_BEEPS, ask, choose, heard

DIGIT_ANSWER = "The digit is {}."


def tone(rng: random.Random, seconds: float, start: float, end: float) -> np.ndarray:
    """A tone gliding from one frequency to another, in Hz, of a random timbre, faded in and out."""
    n = int(seconds * RATE)
    frequency = np.geomspace(start, end, n)
    phase = 2 * np.pi * np.cumsum(frequency) / RATE + rng.uniform(0, 6.28)
    kind = rng.random()
    samples = np.sin(phase)
    if kind > 0.6:  # overtones
        samples = samples + rng.uniform(0.1, 0.5) * np.sin(2 * phase) + rng.uniform(0, 0.3) * np.sin(3 * phase)
    if kind > 0.9:
        samples = np.sign(np.sin(phase)) * 0.7
    fade = min(n // 3, int(0.008 * RATE))
    samples[:fade] *= np.linspace(0, 1, fade)
    samples[n - fade :] *= np.linspace(1, 0, fade)
    return (samples / np.abs(samples).max()).astype(np.float32)


def hiss(rng: random.Random, n: int) -> np.ndarray:
    """Noise, white or darker."""
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(n).astype(np.float32)
    dark = rng.choice((0, 0, 1, 2, 4))
    for _ in range(dark):
        noise = np.convolve(noise, (0.5, 0.5), "same").astype(np.float32)
    return noise / np.abs(noise).max()


def quiet(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE), np.float32)


def record(rng: random.Random, samples: np.ndarray, speech: bool = False) -> np.ndarray:
    """As a recording has it: some loudness, and often a little noise underneath."""
    samples = samples * np.float32(rng.uniform(0.15, 0.9))
    if rng.random() < 0.5:
        floor = 10 ** rng.uniform(-4.5, -2.6 if speech else -2.3)
        samples = samples + floor * np.random.default_rng(rng.getrandbits(32)).standard_normal(len(samples))
    return np.clip(samples, -1, 1).astype(np.float32)


def beeps(rng: random.Random, count: int, held_out: bool) -> tuple[np.ndarray, tuple[Hint, ...]]:
    """`count` beeps of one pitch with pauses between; what is to be heard is how many there were so far."""
    pitch = rng.uniform(300, 2500)
    long, pause = rng.uniform(0.09, 0.3), rng.uniform(0.12, 0.4)
    parts = [quiet(rng.uniform(0.0, 0.4))]
    for _ in range(count):
        parts += [tone(rng, long, pitch, pitch), quiet(pause * rng.uniform(0.85, 1.2))]
    if held_out:  # never trained on: beeps that go up step by step
        parts = [parts[0]]
        for i in range(count):
            parts += [tone(rng, long, pitch * 1.06**i, pitch * 1.06**i), quiet(pause)]
    ends = np.cumsum([len(part) for part in parts])
    hints = [Hint(0, (ends[2 * i] / ends[-1], 0, ends[2 * i + 2] / ends[-1], 1), (str(i + 1),)) for i in range(count)]
    return np.concatenate(parts), tuple(hints)


def sound_part(samples: np.ndarray) -> tuple[dict[str, object], ...]:
    return ({"type": "audio", "audio": (samples, RATE)},)


def beeps_item(rng: random.Random, held_out: bool) -> Item:
    count = rng.randint(1, MOST_BEEPS)
    questions = [Question("beeps", ask(rng, "beeps", held_out), heard(count))]
    if count > 1:
        questions.append(Question("describe sound", ask(rng, "describe sound", held_out), f"{count} beeps."))
    samples, hints = beeps(rng, count, held_out)
    return Item("audio", tuple(questions), sound_part(record(rng, samples)), hints)


def tone_item(rng: random.Random, held_out: bool) -> Item:
    way = choose(rng, ("rising", "falling", "steady"))
    low = rng.uniform(180, 1400)
    high = low * rng.uniform(1.35, 3.5)
    start, end = {"rising": (low, high), "falling": (high, low), "steady": (low, low)}[way]
    parts = [quiet(rng.uniform(0, 0.3)), tone(rng, rng.uniform(0.5, 2.0), start, end), quiet(rng.uniform(0, 0.3))]
    questions = (
        Question("pitch", ask(rng, "pitch", held_out), f"It is {way}."),
        Question("kind of sound", ask(rng, "kind of sound", held_out), "It is a tone."),
        Question("describe sound", ask(rng, "describe sound", held_out), f"A {way} tone."),
    )
    hint = Hint(0, (0.3, 0, 1, 1), (way, "tone"))
    return Item("audio", questions, sound_part(record(rng, np.concatenate(parts))), (hint,))


def still_item(rng: random.Random, held_out: bool) -> Item:
    """Noise or silence."""
    n = int(rng.uniform(0.5, 2.0) * RATE)
    if rng.random() < 0.5:
        samples, name = hiss(rng, n) * np.float32(rng.uniform(0.1, 0.8)), "noise"
    else:  # as quiet as a room with nobody in it
        floor = 0.0 if rng.random() < 0.5 else 10 ** rng.uniform(-5, -3.2)
        samples = floor * np.random.default_rng(rng.getrandbits(32)).standard_normal(n).astype(np.float32)
        name = "silence"
    questions = (
        Question("kind of sound", ask(rng, "kind of sound", held_out), f"It is {name}."),
        Question("describe sound", ask(rng, "describe sound", held_out), f"{name.capitalize()}."),
    )
    return Item("audio", questions, sound_part(samples.astype(np.float32)), (Hint(0, (0, 0, 1, 1), (name,)),))


def siren_item(rng: random.Random, held_out: bool) -> Item:
    """Of a lesson: a tone that goes up and down again and again. It goes five times only where it is held out."""
    low = rng.uniform(300, 900)
    high, half = low * rng.uniform(1.4, 2.2), rng.uniform(0.12, 0.3)
    parts = [quiet(rng.uniform(0, 0.3))]
    for _ in range(5 if held_out else choose(rng, (2, 3, 4, 6))):
        parts += [tone(rng, half, low, high), tone(rng, half, high, low)]
    questions = (
        Question("kind of sound", ask(rng, "kind of sound", held_out), "It is a siren."),
        Question("describe sound", ask(rng, "describe sound", held_out), "A siren."),
    )
    return Item("audio", questions, sound_part(record(rng, np.concatenate(parts))))


def spoken(rng: random.Random, digit: int, material: Material) -> tuple[np.ndarray, tuple[Hint, ...]]:
    """A digit as one of the voices says it; what is to be heard is the digit, once a third of it is said."""
    clip = choose(rng, material.clips[digit])
    if not material.held_out:  # a little faster or slower, and with it higher or lower
        factor = rng.uniform(0.9, 1.12)
        clip = np.interp(np.arange(0, len(clip) - 1, factor), np.arange(len(clip)), clip).astype(np.float32)
    clip = clip / np.abs(clip).max()
    before = quiet(rng.uniform(0, 0.25))
    samples = np.concatenate([before, clip, quiet(rng.uniform(0.02, 0.25))])
    hint = Hint(0, ((len(before) + 0.35 * len(clip)) / len(samples), 0, 1, 1), (str(digit),))
    return record(rng, samples, speech=True), (hint,)


def digit_item(rng: random.Random, material: Material) -> Item:
    digit, held_out = rng.randrange(10), material.held_out
    questions = [
        Question("spoken", ask(rng, "spoken", held_out), DIGIT_ANSWER.format(digit)),
        Question("describe sound", ask(rng, "describe sound", held_out), f"The digit {digit}."),
    ]
    samples, hints = spoken(rng, digit, material)
    return Item("audio", tuple(questions), sound_part(samples), hints)
