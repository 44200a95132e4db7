"""Ask transformers for the logits and greedy tokens of tests/support/golden_cases.py.

    python -m venv VENV && VENV/bin/pip install -r tools/requirements-goldens.txt
    VENV/bin/python tools/make_goldens.py [NAME...]     writes tests/goldens/NAME.json

Everything runs in float32 (a BF16 checkpoint: its rounded weights). A case is refused, and another
seed asked for, where a greedy step is close to a tie, where float64 tells another story, where
decoding with a cache disagrees with decoding without, or where the model only echoes.
"""

import base64
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from support.golden_cases import CASES, NUM_GREEDY, PROMPT_LENGTHS, GoldenCase, prompt_ids  # noqa: E402

# Not in the development environment, so nothing checks their types.
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")

MIN_MARGIN = 5e-3  # of every greedy step: far above float32 noise and the 1e-3 that tests allow
MAX_NOISE = 1e-4  # float32 against float64, over all logits: else routing is near a tie somewhere
MIN_DISTINCT = 5  # tokens of a continuation


class Refused(Exception):
    """This seed makes a poor golden."""


def main() -> None:
    torch.set_grad_enabled(False)
    wanted = sys.argv[1:]
    for case in CASES:
        if wanted and case.name not in wanted:
            continue
        for seed in range(case.seed, case.seed + 400):
            try:
                golden = _golden(case, seed)
            except Refused as reason:
                print(f"{case.name}: seed {seed} refused: {reason}", flush=True)
                continue
            path = ROOT / "tests" / "goldens" / f"{case.name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(golden, indent=1) + "\n")
            note = "" if seed == case.seed else f"  <- set seed={seed} in golden_cases.py"
            print(
                f"{case.name}: seed {seed}, smallest margin {golden['margin']:.4f}{note}",
                flush=True,
            )
            break
        else:
            raise SystemExit(f"{case.name}: no seed will do")


def _golden(case: GoldenCase, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        case.write(Path(name), seed)
        load = transformers.AutoModelForCausalLM.from_pretrained
        options = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model, info = load(name, dtype=torch.float32, output_loading_info=True, **options)
        if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise SystemExit(f"{case.name}: {info}")
        model.eval()
        exact = load(name, dtype=torch.float64, **options).eval()
    vocab = case.config["vocab_size"]
    prompts = [_continuation(model, exact, prompt_ids(n, vocab)) for n in PROMPT_LENGTHS]
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "seed": seed,
        "margin": min(min(prompt["margins"]) for prompt in prompts),
        "prompts": prompts,
    }


def _continuation(model: Any, exact: Any, prompt: list[int]) -> dict[str, Any]:
    ids, margins, cache = list(prompt), [], None
    pending = torch.tensor([prompt])
    for _ in range(NUM_GREEDY):
        out = model(pending, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        top = out.logits[0, -1].topk(2)
        margins.append(float(top.values[0] - top.values[1]))
        if margins[-1] < MIN_MARGIN:
            raise Refused(f"margin {margins[-1]:.5f} at prompt {len(prompt)}")
        ids.append(int(top.indices[0]))
        pending = torch.tensor([[ids[-1]]])
    greedy = ids[len(prompt) :]
    if len(set(greedy)) < MIN_DISTINCT:
        raise Refused(f"only {len(set(greedy))} distinct tokens at prompt {len(prompt)}")
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    if logits[len(prompt) - 1 : -1].argmax(-1).tolist() != greedy:
        raise Refused("a pass without the cache disagrees")
    noise = float((exact(torch.tensor([ids]), use_cache=False).logits[0] - logits).abs().max())
    if noise > MAX_NOISE:
        raise Refused(f"float64 differs by {noise:.1e}")
    positions = sorted({(len(prompt) - 1) // 2, len(prompt) - 1, len(ids) - 1})
    return {
        "prompt_ids": prompt,
        "greedy_ids": greedy,
        "margins": [round(margin, 5) for margin in margins],
        # full rows of logits over prompt + greedy_ids: base64 of little-endian float32
        "logits": {str(p): _encoded(logits[p]) for p in positions},
        "top5": {str(p): _top5(logits[p]) for p in range(len(prompt) - 1, len(ids), 8)},
    }


def _encoded(row: Any) -> str:
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()


def _top5(row: Any) -> dict[str, Any]:
    top = row.topk(5)
    values = [round(float(v), 6) for v in top.values]
    return {
        "ids": top.indices.tolist(),
        "logits": values,
        "logsumexp": round(float(row.logsumexp(0)), 6),
    }


if __name__ == "__main__":
    main()
