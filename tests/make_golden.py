"""Writes tests/data/golden.npz: what transformers computes for the prompts of golden_cases.py.

    python -m venv golden
    golden/bin/pip install torch==2.13.0 transformers==5.23.0 pillow numpy
    golden/bin/python tests/make_golden.py

It imports nothing of mlx_gemma4 and runs without MLX. Everything is computed in float32 with eager attention, from
the weights of toy_checkpoint.py; the attention masks are made here, because transformers 5.23.0 opens the full layers
to image blocks and does not keep the blocks within the window. For each case CHECKPOINT/NAME the file holds

    CHECKPOINT/NAME/token_ids  [L]        the prompt
    CHECKPOINT/NAME/some       [L, V/32]  the logits of every position, every 32nd of them
    CHECKPOINT/NAME/last       [V]        all logits of the last position
    CHECKPOINT/NAME/greedy     [20]       its continuation; suppressed tokens are never chosen, stop tokens not obeyed
"""

import json
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from golden_cases import CHECKPOINTS, EVERY, GOLDEN, GREEDY_TOKENS, LAYOUTS, Run, chats, layout
from PIL import Image
from safetensors.numpy import save_file
from toy import toy_tokenizer
from toy_checkpoint import Shape, config, media_ids, tensors

VERSIONS = {torch: "2.13.0", transformers: "5.23.0"}
CHAT_TEMPLATE = Path(__file__).parent.parent / "mlx_gemma4" / "prompt" / "chat_template.jinja"
LEAST_LEAD = 1e-3  # of a greedy token over the next best: what rounding cannot turn


def reference_model(shape: Shape, seed: int) -> torch.nn.Module:
    """Loaded from a folder, as published checkpoints are: transformers has other names for some tensors."""
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config(shape)))
        save_file(tensors(shape, seed), Path(folder, "model.safetensors"), {"format": "pt"})
        kind = transformers.Gemma4UnifiedForConditionalGeneration
        options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        model, info = kind.from_pretrained(folder, **options)
    if wrong := {problem: names for problem, names in info.items() if names}:
        raise ValueError(f"transformers loads the weights with {wrong}")
    return model.eval()


def masks(length: int, blocks: list[tuple[int, int]], window: int) -> dict[str, torch.Tensor]:
    """What is added to the scores in each kind of layer, [1, 1, L, L]; blocks are (start, end)."""
    causal = torch.ones(length, length).tril().bool()
    opened = causal.clone()
    for start, end in blocks:
        opened[start:end, start:end] = True
    seen = {"full_attention": causal, "sliding_attention": opened.triu(1 - window)}
    return {kind: torch.zeros(length, length).masked_fill(~mask, -1e30)[None, None] for kind, mask in seen.items()}


def media_inputs(runs: list[Run]) -> dict[str, torch.Tensor]:
    """The model's arguments, every run padded to the longest of its kind."""
    inputs: dict[str, torch.Tensor] = {}
    keys = {"image": ("pixel_values", "image_position_ids"), "video": ("pixel_values_videos", "video_position_ids")}
    for kind, (values_key, positions_key) in keys.items():
        if chosen := [run for run in runs if run.kind == kind]:
            inputs[values_key] = padded([run.values.astype(np.float32) / 255 for run in chosen], 0)
            inputs[positions_key] = padded([run.positions.astype(np.int64) for run in chosen], -1)
    if "pixel_values_videos" in inputs:
        inputs["num_frames_per_video"] = torch.tensor([len(inputs["pixel_values_videos"])])
    if sounds := [run.values for run in runs if run.kind == "audio"]:
        inputs["input_features"] = padded(sounds, 0)
        inputs["input_features_mask"] = padded([np.ones(len(sound), bool) for sound in sounds], 0)
    return inputs


def padded(arrays: list[np.ndarray], value: float) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(array) for array in arrays], True, value)


def logits(model: torch.nn.Module, shape: Shape, token_ids: list[int], runs: list[Run]) -> torch.Tensor:
    """[L, vocab]."""
    blocks = [(run.start, run.start + len(run.values)) for run in runs if run.kind != "audio"]
    attention_mask = masks(len(token_ids), blocks, shape.window)
    ids = torch.tensor([token_ids])
    return model(input_ids=ids, attention_mask=attention_mask, use_cache=False, **media_inputs(runs)).logits[0]


def continuation(model: torch.nn.Module, shape: Shape, token_ids: list[int], runs: list[Run]) -> list[int]:
    grown = list(token_ids)
    for _ in range(GREEDY_TOKENS):
        last = logits(model, shape, grown, runs)[-1]
        last[list(media_ids(shape).values())] = -torch.inf
        best = last.topk(2)
        if best.values[0] - best.values[1] < LEAST_LEAD:
            raise ValueError(f"token {len(grown)} is nearly a tie; change the case")
        grown.append(int(best.indices[0]))
    return grown[len(token_ids) :]


def chat_prompt(messages: list[dict[str, Any]], shape: Shape) -> tuple[list[int], list[Run]]:
    """What a processor has to make of messages whose images need no resizing."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=toy_tokenizer(shape.vocab), bos_token="<bos>")
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    runs, expanded = [], ""
    for part in chain.from_iterable(contents):
        if (kind := part["type"]) == "text":
            continue
        if kind == "audio":
            samples, _ = part["audio"]
            made = [Run(kind, 0, np.pad(samples, (0, -len(samples) % 640)).reshape(-1, 640), None)]
            times = [""]
        else:
            images = part["video"] if kind == "video" else [part["image"]]
            made = [Run(kind, 0, *patches(image)) for image in images]
            times = [f"00:{int(i / part['fps']):02d} " for i in range(len(images))] if kind == "video" else [""]
        name = "audio" if kind == "audio" else "image"
        spelled = [
            f"{time}<|{name}>{f'<|{kind}|>' * len(run.values)}<{name}|>" for time, run in zip(times, made, strict=True)
        ]
        before, text = text.split(f"<|{kind}|>", 1)
        expanded += before + " ".join(spelled)
        runs += made
    token_ids = tokenizer(expanded + text, add_special_tokens=False)["input_ids"]
    return token_ids, placed(runs, token_ids, shape)


def patches(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, 6912] and positions [n, 2], row by row."""
    pixels = np.asarray(image)
    corners = [(x, y) for y in range(image.height // 48) for x in range(image.width // 48)]
    cut = [pixels[48 * y : 48 * y + 48, 48 * x : 48 * x + 48].ravel() for x, y in corners]
    return np.stack(cut), np.array(corners, np.int32)


def placed(runs: list[Run], token_ids: list[int], shape: Shape) -> list[Run]:
    """The same runs at the places of their placeholders."""
    ids, end = media_ids(shape), 0
    found = []
    for run in runs:
        start = token_ids.index(ids[f"<|{run.kind}|>"], end)
        end = start + len(run.values)
        found.append(Run(run.kind, start, run.values, run.positions))
    return found


def main() -> None:
    for module, version in VERSIONS.items():
        if module.__version__.partition("+")[0] != version:
            raise SystemExit(f"{module.__name__} is {module.__version__}; expected {version}")
    torch.set_grad_enabled(False)
    golden: dict[str, np.ndarray] = {}
    for checkpoint, (shape, seed) in CHECKPOINTS.items():
        model = reference_model(shape, seed)
        prompts = {name: layout(name, shape) for name in LAYOUTS}
        prompts |= {name: chat_prompt(messages, shape) for name, messages in chats().items()}
        for name, (token_ids, runs) in prompts.items():
            found = logits(model, shape, token_ids, runs).numpy()
            case = f"{checkpoint}/{name}"
            golden[f"{case}/token_ids"] = np.array(token_ids, np.int32)
            golden[f"{case}/some"] = found[:, ::EVERY]
            golden[f"{case}/last"] = found[-1]
            golden[f"{case}/greedy"] = np.array(continuation(model, shape, token_ids, runs), np.int32)
            print(f"{case}: {len(token_ids)} tokens, {[run.kind for run in runs]}")
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **golden)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
