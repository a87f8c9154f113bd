"""What the items are made of that is not drawn or computed: fonts, and digits spoken by espeak-ng.

`python -m training.material FOLDER` gathers both on a machine that has them, once; training needs only the folder.
"""

import random
import shutil
import subprocess
import wave
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import soxr
import typer

from training.world import DIGITS

RATE = 16000  # Hz
TAKES = 3  # of each digit in each voice

# Accents and voices of espeak-ng; each voice is spoken in each accent of its side.
ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
VOICES = (
    "", "f1", "f2", "f3", "f4", "m1", "m2", "m3", "m4", "m5", "m6", "m8", "Alex", "Alicia", "Andrea", "Andy", "Denis",
    "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael", "Mike", "Nguyen", "adam",
    "anika", "antonio", "aunty", "belinda", "boris", "caleb", "david", "ed", "grandma", "gustave", "iven", "iven2",
    "john", "marcelo", "max", "michel", "miguel", "norbert", "pablo", "paul", "pedro", "quincy", "robert", "sandro",
    "shelby", "steph2", "travis", "victor", "zac", "klatt", "klatt2",
)  # fmt: skip
HELD_OUT_ACCENTS = ("en-us", "en-gb", "en-gb-scotland")
HELD_OUT_VOICES = (
    "f5",
    "m7",
    "Annie",
    "Gene2",
    "benjamin",
    "edward",
    "linda",
    "rob",
    "steph",
    "kaukovalta",
    "grandpa",
    "iven3",
)

# Families by the beginnings of their files' names. Clones of one design are on one side.
FONTS = (
    "DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "DejaVuSansCondensed", "Lato", "Carlito", "Roboto",
    "RobotoCondensed",
    "NotoSans", "NotoSerif", "NotoSansMono", "FreeSans", "NimbusSans", "Arimo", "LiberationSans", "FreeMono", "Cousine",
    "LiberationMono", "Quicksand", "Comfortaa", "URWBookman", "C059", "P052", "EBGaramond12", "FiraCode", "Hack",
    "NotoSansDisplay", "NotoSerifDisplay", "NimbusSansNarrow", "LiberationSansNarrow",
)  # fmt: skip
HELD_OUT_FONTS = (
    "OpenSans", "Inter", "InterDisplay", "Cantarell", "Caladea", "Tinos", "LiberationSerif", "NimbusRoman",
    "FreeSerif", "URWGothic",
)  # fmt: skip
WEIGHTS = {"", "Regular", "Bold", "Medium", "SemiBold", "Semibold", "Roman", "Demi", "Book", "ExtraBold", "Heavy"}
SYSTEM_FONTS = Path("/usr/share/fonts")
SIDES = {False: "train", True: "held-out"}


@dataclass(frozen=True)
class Material:
    """One side's: of training, or held out."""

    held_out: bool
    fonts: list[str]  # files
    clips: dict[int, list[np.ndarray]]  # digit: clips, 16 kHz float32, full scale -1 to 1, silence cut off


def load_material(folder: Path, held_out: bool) -> Material:
    """What `gather` has put there; FileNotFoundError if it has not."""
    clips: dict[int, list[np.ndarray]] = {digit: [] for digit in range(10)}
    with np.load(folder / f"speech-{SIDES[held_out]}.npz") as file:
        for name in file.files:
            clips[int(name.split()[0])].append(file[name].astype(np.float32) / 32768)
    return Material(held_out, sorted(map(str, (folder / f"fonts-{SIDES[held_out]}").iterdir())), clips)


def system_fonts(held_out: bool) -> list[Path]:
    """Files of one side's fonts that this machine has."""
    names = HELD_OUT_FONTS if held_out else FONTS
    found = []
    for path in sorted([*SYSTEM_FONTS.rglob("*.ttf"), *SYSTEM_FONTS.rglob("*.otf")]):
        family, _, weight = path.stem.partition("-")
        if family.endswith("Bold") and not weight:  # FreeSansBold has no hyphen
            family, weight = family.removesuffix("Bold"), "Bold"
        if family in names and weight in WEIGHTS:
            found.append(path)
    return found


def speak(text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """A word spoken by espeak-ng, 16 kHz float32; FileNotFoundError if it is not installed."""
    done = subprocess.run(
        ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text],
        capture_output=True,
        check=True,
    )
    with wave.open(BytesIO(done.stdout)) as file:  # espeak-ng writes no true length into a pipe
        rate, data = file.getframerate(), file.readframes(1 << 24)
    samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / 32768
    samples = soxr.resample(samples, rate, RATE)
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1]


def record_speech(held_out: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Each digit in each voice of a side and some accents, at several speeds and pitches, as int16."""
    rng = random.Random(f"{seed} {held_out}")
    accents, voices = (HELD_OUT_ACCENTS, HELD_OUT_VOICES) if held_out else (ACCENTS, VOICES)
    clips: dict[str, np.ndarray] = {}
    for voice in voices:
        for accent in accents if held_out else rng.sample(accents, 3):
            for digit, word in enumerate(DIGITS):
                for _ in range(TAKES):
                    name = f"{accent}+{voice}" if voice else accent
                    samples = speak(word, name, rng.randint(110, 210), rng.randint(20, 80))
                    clips[f"{digit} {len(clips)}"] = (samples * 32767).astype(np.int16)
    return clips


def gather(folder: Annotated[Path, typer.Argument(help="Where to put it.")]) -> None:
    for held_out, side in SIDES.items():
        fonts = folder / f"fonts-{side}"
        fonts.mkdir(parents=True, exist_ok=True)
        for path in system_fonts(held_out):
            shutil.copy(path, fonts)
        np.savez(folder / f"speech-{side}.npz", **record_speech(held_out))  # type: ignore[arg-type]


if __name__ == "__main__":
    typer.run(gather)
