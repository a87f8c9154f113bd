"""Train the demo's drafter on its target's own hidden states: `python -m training.draft FOLDER`.

The target is fixed. As in decoding, a proposal starts from the hidden state of the last committed position and the
token after it, and each further one from the drafter's own output; what is learnt is the target's choice.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import typer
from mlx import nn

from mlx_gemma4.config import read_config
from mlx_gemma4.model.drafter import Drafter, read_drafter_config
from mlx_gemma4.model.model import Model
from mlx_gemma4.prompt.processor import load_processor
from mlx_gemma4.tune.state import save, trees_of
from mlx_gemma4.weights.load import parameters
from training.forward import (
    after_attention,
    attend,
    cross_entropy,
    for_heads,
    heads_first,
    hidden_states,
    learnt_logits,
    norm,
    turn,
    turns_of,
)
from training.material import load_material
from training.rows import Batch, batch
from training.start import initialise_drafter
from training.train import FRAME, LOOKING, PATCH, ROW, Source

PROPOSALS = 4  # learnt in a row
ROWS = {"text": 6, "image": 1, "audio": 1}


def propose(
    drafter: Drafter, embedding: mx.array, hidden: mx.array, turns: Mapping[str, tuple[mx.array, mx.array]],
    mask: mx.array, keys: Mapping[str, tuple[mx.array, mx.array]],
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """One proposal after every position at once: embedding, hidden [B, T, D] -> drafter's states and next hidden."""
    h = drafter.pre_projection(mx.concatenate([embedding, hidden], axis=-1))
    for layer in drafter.layers:
        attention, x = layer.self_attn, norm(layer.input_layernorm, h)
        q = attention.q_proj(x).reshape(
            *x.shape[:2], attention.q_proj.weight.shape[0] // attention.head_dim, attention.head_dim
        )
        q = turn(heads_first(norm(attention.q_norm, q)), *turns[layer.kind])
        out = attention.o_proj(attend(q, *keys[layer.kind], mask))
        h = after_attention(layer, h, out)
    h = norm(drafter.norm, h)
    return h, drafter.post_projection(h)


def loss(drafter: Drafter, target: Model, one: Batch) -> tuple[mx.array, mx.array]:
    """Mean surprise at the target's choices; for each place in a round the part of proposals that hit, [PROPOSALS]."""
    hidden, early, keys = hidden_states(target, one)
    hidden = mx.stop_gradient(hidden)
    learnt = one.learnt[one.answers].tolist()
    choices = mx.argmax(learnt_logits(target, hidden, early, one), axis=-1)[mx.array(np.flatnonzero(one.answers))]
    turns = turns_of(target, mx.array(one.positions))
    mask = for_heads(
        one.full, drafter.layers[0].self_attn.q_proj.weight.shape[0] // drafter.layers[0].self_attn.head_dim
    )
    positions = {place: index for index, place in enumerate(learnt)}
    total, hits = mx.array(0.0), []
    for ahead in range(1, PROPOSALS + 1):
        newest = np.roll(one.ids, -ahead, axis=1)  # the token `ahead` after each position
        embedding = mx.stop_gradient(target.language_model.embed(mx.array(newest)))
        states, hidden = propose(drafter, embedding, hidden, turns, mask, keys)
        # after position p with the tokens up to p + ahead known, the choice is that of position p + ahead
        known = [(p, positions[p + ahead]) for p in learnt if p + ahead in positions]
        at, wanted = mx.array([p for p, _ in known]), choices[mx.array([i for _, i in known])]
        logits = drafter.embed_tokens.as_linear(states.flatten(0, 1)[at])
        total = total + mx.mean(cross_entropy(logits, wanted))
        hits.append(mx.mean(mx.argmax(logits, axis=-1) == wanted))
    return total / PROPOSALS, mx.stack(hits)


def main(
    folder: Annotated[Path, typer.Argument(help="Of the target's run.")],
    steps: Annotated[int, typer.Option(help="How many.")] = 600,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    target_state: Annotated[str, typer.Option(help="The target's file.")] = "state",
) -> None:
    config = read_config(folder)
    model, drafter = Model(config), Drafter(read_drafter_config(folder / "drafter"))
    model.update(trees_of(folder / f"{target_state}.safetensors")[0]["model"])
    model.freeze()
    initialise_drafter(drafter, 0)
    optimise = optim.AdamW(
        learning_rate=optim.cosine_decay(rate, steps, 0.02 * rate), betas=[0.9, 0.98], weight_decay=0.0
    )
    source = Source(load_processor(folder, config), load_material(folder, False), "draft")
    step_gradient = nn.value_and_grad(drafter, lambda one: loss(drafter, model, one))
    began, seen = time.perf_counter(), np.zeros(PROPOSALS)
    for step in range(steps):
        rows = [source.row(kind, ROW, LOOKING) for kind, count in ROWS.items() for _ in range(count)]
        (_, hits), gradients = step_gradient(batch(rows, ROW, PATCH, FRAME))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimise.update(drafter, gradients)
        mx.eval(drafter.parameters(), optimise.state, hits)
        seen += np.array(hits) / 50
        if (step + 1) % 50 == 0:
            shares = " ".join(f"{share:.2f}" for share in seen)
            print(f"{step + 1} hits {shares} {(time.perf_counter() - began) / 50:.2f} s/step", flush=True)
            began, seen = time.perf_counter(), np.zeros(PROPOSALS)
    save(folder / "drafter-state.safetensors", {"drafter": parameters(drafter)}, {"step": str(steps)})


if __name__ == "__main__":
    typer.run(main)
