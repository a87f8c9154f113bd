"""Whether training fits into memory, before anything is loaded, and what would make it fit."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from mlx_gemma4.convert.recipes import BITS, nbytes_at
from mlx_gemma4.planner import Tuning, longest, predict_tuning
from mlx_gemma4.terminal import size_text
from mlx_gemma4.weights.adapter import layer_of, matrices_of
from mlx_gemma4.weights.load import Checkpoint

SHORTEST_ROW = 128


@dataclass(frozen=True)
class TuningPlan:
    tokens: int  # of the longest row
    rank: int
    grad_checkpoint: bool
    num_layers: int = -1  # the last ones; -1: all
    media: Collection[str] = ()  # of "image" and "audio", those whose projection is adapted

    @property
    def text(self) -> str:
        twice = "layers computed twice" if self.grad_checkpoint else "layers computed once"
        return f"rows of {self.tokens} tokens, rank {self.rank}, {twice}"


def of_plan(checkpoint: Checkpoint, plan: TuningPlan) -> Tuning:
    layers = len(checkpoint.config.text.layer_types)
    first = 0 if plan.num_layers < 0 else layers - plan.num_layers
    owners = {"image": "embed_vision.", "audio": "embed_audio."}
    projections = tuple(owners[kind] for kind in plan.media)
    trained = plan.rank * sum(
        sum(shape)
        for path, shape in matrices_of(checkpoint.model).items()
        if path.startswith(projections) or ((layer := layer_of(path)) is not None and layer >= first)
    )
    passed = layers if projections else layers - first  # on the way back
    return predict_tuning(checkpoint.footprint, trained, plan.tokens, plan.grad_checkpoint, passed)


def longest_row(checkpoint: Checkpoint, plan: TuningPlan, room: int) -> int:
    most = checkpoint.config.text.max_position_embeddings
    return longest(lambda tokens: of_plan(checkpoint, replace(plan, tokens=tokens)).peak <= room, most)


def smaller_tuning(checkpoint: Checkpoint, plan: TuningPlan, room: int) -> Iterator[str]:
    """Single changes that make it fit, those first that cost time alone."""
    if not plan.grad_checkpoint and of_plan(checkpoint, replace(plan, grad_checkpoint=True)).peak <= room:
        yield "layers computed twice (--grad-checkpoint)"
    ranks = [rank for rank in (64, 32, 16, 8, 4, 2, 1) if rank < plan.rank]
    fitting = (rank for rank in ranks if of_plan(checkpoint, replace(plan, rank=rank)).peak <= room)
    if (rank := next(fitting, None)) is not None:
        yield f"rank {rank} (--rank {rank})"
    if (tokens := longest_row(checkpoint, plan, room)) >= SHORTEST_ROW:
        yield f"rows of {tokens} tokens (--max-seq-length {tokens})"
    for bits in sorted(BITS["affine"], reverse=True):
        weights = nbytes_at(checkpoint.config, bits)
        smaller = replace(checkpoint, footprint=replace(checkpoint.footprint, weights=weights))
        if weights < checkpoint.footprint.weights and of_plan(smaller, plan).peak <= room:
            yield f"{bits} bits a weight ({size_text(weights)}, mlx_gemma4.convert --q-bits {bits})"
            return


def check_plan(checkpoint: Checkpoint, plan: TuningPlan, room: int) -> str:
    """What training takes, in one line. MemoryError if that is more than there is room, with what would make it fit."""
    found = of_plan(checkpoint, plan)
    needed = f"{size_text(found.peak)}, {size_text(found.weights)} of them for weights"
    if found.peak > room:
        changes = "; or ".join(smaller_tuning(checkpoint, plan, room)) or "a smaller model"
        raise MemoryError(
            f"training with {plan.text} takes {needed}, and this machine lets a model hold {size_text(room)}; "
            f"expected {changes}"
        )
    return f"{plan.text}: training takes {needed}; this machine lets a model hold {size_text(room)}"
