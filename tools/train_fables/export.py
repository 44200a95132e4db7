"""A checkpoint as a Hugging Face folder, compared with transformers' own model.

    python -m tools.train_fables.export OUT [--checkpoint final]

Writes OUT/hub: what `shoal convert` reads. Fails where the logits of transformers differ by more
than 1e-4 from those of the model that was trained. Writes OUT/reference.npz, ids [B, T] and
transformers' logits [B, T, V], for the comparison with shoal (`finish`).
"""

# pyright: reportMissingImports=false

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tools.train_fables.chat import CHAT_TEMPLATE
from tools.train_fables.model import Fables, Geometry
from tools.train_fables.train import Rows

TOLERANCE = 1e-4  # on logits of either implementation in float32
# Sampled by default: the likeliest name of somebody new is always that of somebody known.
TIE = 1e-5  # of router values: closer than that, float noise chooses the expert
GENERATION = {
    "eos_token_id": 0,
    "max_new_tokens": 400,
    "do_sample": True,
    "temperature": 0.7,
    "min_p": 0.02,
}


def load(path: Path) -> Fables:
    """Return the model of a checkpoint."""
    state: dict[str, Any] = torch.load(path, weights_only=False)
    model = Fables(Geometry(**state["geometry"]))
    model.load_state_dict(state["model"])
    return model.eval()


def write_hub(model: Fables, out: Path, hub: Path) -> None:
    """Write the folder."""
    hub.mkdir(exist_ok=True)
    save_file(model.hub_weights(), hub / "model.safetensors", metadata={"format": "pt"})
    (hub / "config.json").write_text(json.dumps(model.g.config(), indent=1) + "\n")
    (hub / "generation_config.json").write_text(json.dumps(GENERATION, indent=1) + "\n")
    (hub / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(out / name, hub / name)


@torch.no_grad()
def transformers_logits(hub: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return transformers' logits [B, T, V] of ids [B, T]."""
    from transformers import Qwen3MoeForCausalLM

    theirs = Qwen3MoeForCausalLM.from_pretrained(hub, dtype=torch.float32).eval()
    return theirs(ids).logits


@torch.no_grad()
def untied(model: Fables, ids: torch.Tensor) -> torch.Tensor:
    """Return [B, T] bool: rows up to the first token that a router's last choice is a tie for."""
    gaps: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, logits: torch.Tensor) -> None:
        best = logits.topk(model.g.top_k + 1, dim=-1).values
        gaps.append((best[:, -2] - best[:, -1]).view(ids.shape))

    hooks = [layer.mlp.gate.register_forward_hook(keep) for layer in model.layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    is_tie = torch.stack(gaps).amin(0) < TIE
    return is_tie.int().cumsum(-1) == 0


def main() -> None:
    """Export and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", default="final")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load(args.out / f"{args.checkpoint}.pt")
    write_hub(model, args.out, args.out / "hub")
    ids = Rows(args.out / "seed.npz", 0).take(4, 256)
    theirs = transformers_logits(args.out / "hub", ids)
    clear = untied(model, ids)
    with torch.no_grad():
        difference = float((theirs - model(ids)).abs().amax(-1)[clear].max())
    reference = {"ids": ids.numpy(), "logits": theirs.numpy(), "clear": clear.numpy()}
    np.savez(args.out / "reference.npz", allow_pickle=False, **reference)
    print(
        f"{int(clear.sum())} of {clear.numel()} tokens compared: the others follow a router's tie"
    )
    print(f"{args.out / 'hub'}: logits differ by at most {difference:.2g} from transformers'")
    if not difference <= TOLERANCE:
        raise SystemExit(f"more than {TOLERANCE}: the export is wrong")


if __name__ == "__main__":
    main()
