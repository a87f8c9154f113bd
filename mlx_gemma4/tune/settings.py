"""What decides a run's outcome, as `mlx_lm.lora` names it."""

from dataclasses import dataclass

from mlx_gemma4.errors import shown

TYPES = ("lora", "dora")


@dataclass(frozen=True)
class Adapter:
    """What an adapter is made of. ValueError if no matrix can have such a one."""

    fine_tune_type: str = "lora"  # "lora" | "dora"
    num_layers: int = -1  # the last ones; -1: all
    rank: int = 8
    scale: float = 10.0

    def __post_init__(self) -> None:
        if self.fine_tune_type not in TYPES:
            raise ValueError(f"fine_tune_type is {shown(self.fine_tune_type)}; expected lora or dora")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected a whole number above 0")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale is {self.scale:g}; expected a number above 0")

    def check_layers(self, layers: int) -> None:
        """ValueError unless a model of so many layers has those that are to be adapted."""
        if self.num_layers != -1 and not 1 <= self.num_layers <= layers:
            raise ValueError(f"num_layers is {self.num_layers}; expected 1 to {layers}, or -1 for all")


@dataclass(frozen=True)
class Settings:
    """The same settings and data give the same adapter."""

    adapter: Adapter
    iters: int  # batches
    batch_size: int  # examples, of each process
    grad_accumulation_steps: int  # batches of an update
    learning_rate: float
    warmup: int  # updates
    max_seq_length: int
    steps_per_eval: int
    save_every: int
    val_batches: int  # -1: all
    patience: int  # validations in a row that are no better; 0: never stop for that
    grad_checkpoint: bool
    seed: int
    image_budget: int | None
