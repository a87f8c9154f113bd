"""OpenAI's transcriptions: a recording of any length to what is said in it, and when."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from mlx_gemma4.decoding.sampling import Sampling
from mlx_gemma4.errors import one_line, shown
from mlx_gemma4.media.audio import TRAINED_SECONDS, read_audio
from mlx_gemma4.reply.reply import Reply
from mlx_gemma4.serve.ask import Ask, Refused

RATE = 16000  # Hz
STEP = RATE // 50  # samples of which the loudness is one number: 20 ms
PAUSE = 15  # steps: a pause between sentences has 0.3 s
SHORTEST = 10 * RATE  # of a piece that is cut, so that few words stand without what is around them
LONGEST = TRAINED_SECONDS * RATE
SILENT = 1e-4  # of full scale
TOKENS = 512  # of a piece: 30 s of fast speech are about 150 words
ALONGSIDE = 4  # pieces that are asked for at once

INSTRUCTION = "Transcribe the following speech segment in {language}. Only output the transcription, with no newlines."
FORMATS = {"json": "application/json", "verbose_json": "application/json", "text": "text/plain; charset=utf-8"}


@dataclass(frozen=True)
class Transcription:
    """What is asked."""

    recording: bytes
    form: str
    language: str | None
    prompt: str
    temperature: float
    model: str | None

    def ask(self, samples: np.ndarray) -> Ask:
        said = INSTRUCTION.format(language=self.language or "its original language")
        parts = [
            {"type": "audio", "audio": (samples, RATE)},
            {"type": "text", "text": f"{said}\n{self.prompt}" if self.prompt else said},
        ]
        return Ask(
            messages=[{"role": "user", "content": parts}], thinking=False, max_tokens=TOKENS,
            sampling=Sampling(temperature=self.temperature),
        )  # fmt: skip

    def answer(self, samples: np.ndarray, pieces: list[tuple[int, int]], replies: list[Reply]) -> bytes:
        texts = [reply.text.strip() for reply in replies]
        text = " ".join(filter(None, texts))
        if self.form == "text":
            return f"{text}\n".encode()
        stats = [reply.stats for reply in replies]
        read, written = sum(own.prompt_tokens for own in stats), sum(own.generation_tokens for own in stats)
        usage = {"type": "tokens", "input_tokens": read, "output_tokens": written, "total_tokens": read + written}
        if self.form == "json":
            return json.dumps({"text": text, "usage": usage}, ensure_ascii=False).encode()
        segments = [
            {"id": index, "start": start / RATE, "end": end / RATE, "text": said}
            for index, ((start, end), said) in enumerate(zip(pieces, texts, strict=True))
        ]
        told = {"task": "transcribe", "language": self.language or "", "duration": len(samples) / RATE, "text": text}
        return json.dumps(told | {"segments": segments, "usage": usage}, ensure_ascii=False).encode()


async def read_form(body: bytes, content_type: str) -> Transcription:
    """Refused for what is no form, or asks for what is not done here."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    if not content_type.lower().startswith("multipart/form-data"):
        raise Refused("the body is no form; expected multipart/form-data with a file")
    headers = [(b"content-type", content_type.encode("latin-1", "replace"))]
    try:
        async with Request({"type": "http", "headers": headers}, receive).form(max_files=1) as form:
            return await read_fields(form)
    except (MultiPartException, FormParserError, KeyError, UnicodeError) as error:
        raise Refused(f"the form cannot be read: {one_line(error)}") from None


async def read_fields(form: FormData) -> Transcription:
    def field(name: str) -> str:
        value = form.get(name)
        return value if isinstance(value, str) else ""

    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise Refused("file is missing; expected a recording")
    kind = field("response_format") or "json"
    if kind not in FORMATS:
        raise Refused(f"response_format is {shown(kind)}; expected {', '.join(FORMATS)}")
    if field("stream").lower() in ("true", "1"):
        raise Refused("stream is true; expected false: transcriptions come whole")
    if "word" in form.getlist("timestamp_granularities[]"):
        raise Refused("timestamp_granularities has word; expected segment")
    try:
        temperature = float(field("temperature") or 0)
    except ValueError:
        temperature = math.nan
    if not 0 <= temperature <= 2:
        raise Refused(f"temperature is {shown(form['temperature'])}; expected a number from 0 to 2")
    language, model = field("language") or None, field("model") or None
    return Transcription(await file.read(), kind, language, field("prompt"), temperature, model)


def read_recording(recording: bytes) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Its samples, and where it is cut. MediaError if it cannot be read."""
    samples = read_audio(recording, RATE)
    return samples, [piece for piece in cut(samples) if np.abs(samples[slice(*piece)]).max() > SILENT]


def cut(samples: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, end) of pieces of at most 30 s; each but the last ends in the quietest place that comes late enough."""
    if len(samples) <= LONGEST:
        yield 0, len(samples)
        return
    steps = samples[: len(samples) // STEP * STEP].reshape(-1, STEP)
    loudness = np.convolve(np.square(steps).mean(axis=1), np.ones(PAUSE) / PAUSE, "same")
    start = 0
    while len(samples) - start > LONGEST:
        window = loudness[(start + SHORTEST) // STEP : (start + LONGEST) // STEP]
        quietest = np.flatnonzero(window <= window.min() * 1.01)[-1]
        end = start + SHORTEST + int(quietest) * STEP
        yield start, end
        start = end
    yield start, len(samples)
