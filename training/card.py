"""The demo's model card: what it was trained on, said by the modules that it was trained with."""

from mlx_gemma4.convert.card import front_matter
from training.films import FRAMES
from training.material import ACCENTS, FONTS, HELD_OUT_ACCENTS, HELD_OUT_FONTS, HELD_OUT_VOICES, VOICES
from training.pictures import GROUNDS, HELD_OUT_GROUNDS, SIZES
from training.texts import HELD_OUT_QUESTIONS, HELD_OUT_WORDS, WORDS
from training.tools import TOOLS
from training.world import (
    CLAUSE_FRAMES,
    COLOURS,
    DIRECTIONS,
    HEROES,
    MOST_BEEPS,
    MOST_SHAPES,
    NAME_FRAMES,
    PLACES,
    POLITE,
    SHAPES,
    THINGS,
    WORDINGS,
)

TEMPLATE = """\
{front_matter}
# The demo model of mlx_gemma4

A toy for checking an installation: Gemma 4's architecture and file set with eight million weights, trained from
scratch on synthetic items, with a drafter of its own. It knows the world described here and nothing else; to most other
questions it answers "I don't know." It holds no weights of Google's.

```sh
mlx_gemma4.generate --model demo --image mlx_gemma4/demo/samples/shapes.png --prompt "What is in the picture?"
```

## What it was trained on

- **Pictures**: 1 to {shapes} shapes ({kinds}) in {colours}, or a number from 10 to 99; grounds {grounds}, in pale
  colours; {small} to {large} pixels a side, sometimes blurred or saved as JPEG. Seen with 70 tokens.
- **Sounds**: 1 to {beeps} beeps; a rising, a falling or a steady tone; noise; silence; a digit spoken by espeak-ng.
- **Films**: {frames} frames, one a second: a shape that appears in one of the first four and moves {directions}, or
  rests.
- **A picture and a sound together**: how many shapes and beeps, and whether the numbers are the same.
- **Words**: to count, spell and reverse their letters: {words} real ones and made-up ones; sums of two numbers below
  100; days and months; counting on.
- **Stories** of {heroes}, who find a {things}, at the {places}.
- **Tools**: {tools}.
- With thinking on, a thought before the answer.

Fonts: {fonts}.

Voices of espeak-ng: {voices}; in the accents {accents}.

## What it was never trained on, and is scored by

Grounds {held_out_grounds}; {held_out_small} to {held_out_large} pixels a side; beeps that go up step by step; one pair
in eight of the sums; {held_out_words} words; {questions} questions out of its world; the wordings marked below.

Fonts: {held_out_fonts}.

Voices: {held_out_voices}; accents {held_out_accents}.

The scores are in `benchmarks/README.md` of the project.

## Wordings

A clause stands in one of {clause_frames}; a name in one of {name_frames}. Some begin with {polite}, say where to look
or listen ("in this picture", "Listen to the sound."), begin or end with a word or two more, are in lower case, or have
a word in them that is none.

{wordings}
"""


def listed(names: tuple[str, ...]) -> str:
    return ", ".join(name or "(the accent's own)" for name in names)


def model_card() -> str:
    wordings = "\n".join(
        f"- {task}: {' / '.join(said.train)}"
        + "".join(
            f"\n  - {kind}: {' / '.join(texts)}"
            for kind, texts in (
                ("clauses", said.clauses), ("names", said.names), ("never trained on", said.held_out),
            )
            if texts
        )
        for task, said in (WORDINGS | {tool.name: tool.wordings for tool in TOOLS}).items()
    )  # fmt: skip
    return TEMPLATE.format(
        front_matter=front_matter(None),
        shapes=MOST_SHAPES, kinds=listed(SHAPES), colours=listed(tuple(COLOURS)), grounds=listed(GROUNDS),
        small=SIZES[0].start, large=SIZES[0].stop - 1, beeps=MOST_BEEPS, frames=FRAMES, directions=listed(DIRECTIONS),
        words=len(WORDS), heroes=listed(HEROES), things=listed(THINGS), places=listed(PLACES),
        tools=listed(tuple(tool.name for tool in TOOLS)), fonts=listed(FONTS), voices=listed(VOICES),
        accents=listed(ACCENTS), held_out_grounds=listed(HELD_OUT_GROUNDS), held_out_small=SIZES[1].start,
        held_out_large=SIZES[1].stop - 1, held_out_words=len(HELD_OUT_WORDS), questions=len(HELD_OUT_QUESTIONS),
        held_out_fonts=listed(HELD_OUT_FONTS), held_out_voices=listed(HELD_OUT_VOICES),
        held_out_accents=listed(HELD_OUT_ACCENTS), wordings=wordings,
        clause_frames=" / ".join(frame.replace("{}", "…") for frame in CLAUSE_FRAMES),
        name_frames=" / ".join(frame.replace("{}", "…") for frame in NAME_FRAMES), polite=listed(POLITE),
    )  # fmt: skip
