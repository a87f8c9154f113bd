"""Writes tests/data/golden_drafts.npz: what transformers' drafter proposes at every position of some sequences.

    golden/bin/python tests/make_golden_drafts.py     (the environment of make_golden.py)

Target and drafter are those of toy_checkpoint.py, in float32 with eager attention. transformers 5.23.0 cannot run the
pair as it is: it shares no keys when `num_kv_shared_layers` is 0, which is repaired here. And it hands the drafter one
position too many and the stale keys of rejected drafts; here the drafter is called by itself, with exactly the
committed keys, in sliding layers the last `window` of them, at the last committed position. The file holds

    CHECKPOINT/token_ids  [L]
    CHECKPOINT/proposals  [L - 1, 3]  row n - 1: with token_ids[:n] committed and token_ids[n] the newest token, the
                                      drafter greedily proposes these; suppressed tokens never,
                                      -1 from where the best two are so near that rounding could turn them
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from golden_cases import CHECKPOINTS, generator
from make_golden import LEAST_LEAD, VERSIONS, masks, reference_model
from safetensors.numpy import save_file
from toy_checkpoint import Shape, drafter_config, drafter_tensors, media_ids
from transformers.models.gemma4_unified import configuration_gemma4_unified

GOLDEN_DRAFTS = Path(__file__).with_name("data") / "golden_drafts.npz"
TOKENS, DRAFTS = 90, 3


def share_keys() -> None:
    """The last layer of each kind stores its keys and values for others; without this none does."""

    def modes(self: Any) -> list[str | None]:
        count = self.num_hidden_layers
        first = count - self.num_kv_shared_layers
        found: list[str | None] = [None if i < first else "reuse" for i in range(count)]
        for kind in set(self.layer_types[:first]):
            found[max(i for i in range(first) if self.layer_types[i] == kind)] = "store"
        return found

    configuration_gemma4_unified.Gemma4UnifiedTextConfig.kv_sharing_modes = property(modes)


def reference_drafter(shape: Shape, seed: int) -> torch.nn.Module:
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(drafter_config(shape)))
        save_file(drafter_tensors(shape, seed, None), Path(folder, "model.safetensors"), {"format": "pt"})
        kind = transformers.Gemma4UnifiedAssistantForCausalLM
        options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        drafter, info = kind.from_pretrained(folder, **options)
    if wrong := {problem: names for problem, names in info.items() if names}:
        raise ValueError(f"transformers loads the drafter's weights with {wrong}")
    return drafter.eval()


def proposals(
    model: Any, drafter: Any, shape: Shape, token_ids: list[int], hidden: torch.Tensor, keys: Any
) -> list[int]:
    """What follows token_ids, of which the last has no key yet."""
    committed = len(token_ids) - 1
    shared = {kind: tuple(rows[:, :, :committed] for rows in pair) for kind, pair in keys.items()}
    near = tuple(rows[:, :, -shape.window :] for rows in shared["sliding_attention"])
    shared["sliding_attention"] = near
    embed = model.get_input_embeddings()
    token, h, chosen = torch.tensor([[token_ids[-1]]]), hidden[committed - 1][None, None], []
    for _ in range(DRAFTS):
        found = drafter(
            inputs_embeds=torch.cat([embed(token), h], dim=-1), position_ids=torch.tensor([[committed - 1]]),
            shared_kv_states=shared, use_cache=False,
        )  # fmt: skip
        logits = found.logits[0, -1].clone()
        logits[list(media_ids(shape).values())] = -torch.inf
        best = logits.topk(2)
        if best.values[0] - best.values[1] < LEAST_LEAD:
            break
        chosen.append(int(best.indices[0]))
        token, h = torch.tensor([[chosen[-1]]]), found.last_hidden_state
    return chosen + [-1] * (DRAFTS - len(chosen))


def main() -> None:
    for module, version in VERSIONS.items():
        if module.__version__.partition("+")[0] != version:
            raise SystemExit(f"{module.__name__} is {module.__version__}; expected {version}")
    torch.set_grad_enabled(False)
    share_keys()
    golden: dict[str, np.ndarray] = {}
    for checkpoint, (shape, seed) in CHECKPOINTS.items():
        model, drafter = reference_model(shape, seed), reference_drafter(shape, seed)
        ids = generator(f"drafts {checkpoint}").integers(110, min(media_ids(shape).values()), TOKENS).tolist()
        found = model.model(
            input_ids=torch.tensor([ids]), attention_mask=masks(len(ids), [], shape.window), use_cache=False,
            return_shared_kv_states=True,
        )  # fmt: skip
        hidden, keys = found.last_hidden_state[0], found.shared_kv_states
        rows = [proposals(model, drafter, shape, ids[: n + 1], hidden, keys) for n in range(1, len(ids))]
        golden[f"{checkpoint}/token_ids"] = np.array(ids, np.int32)
        golden[f"{checkpoint}/proposals"] = np.array(rows, np.int32)
        print(f"{checkpoint}: {len(rows)} positions, {len({tuple(row) for row in rows})} different proposals")
    np.savez_compressed(GOLDEN_DRAFTS, **golden)
    print(f"{GOLDEN_DRAFTS}: {GOLDEN_DRAFTS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
