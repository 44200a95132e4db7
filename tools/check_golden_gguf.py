"""Let llama.cpp read what tests/support/golden_gguf.py writes: its logits must be the goldens.

    VENV/bin/python tools/check_golden_gguf.py     environment: tools/requirements-goldens.txt

So the tests convert GGUF files that are laid out as real ones, not as we imagine them.
"""

import base64
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from support.golden_cases import GGUF_CASES, GoldenCase  # noqa: E402
from support.golden_gguf import write_gguf  # noqa: E402

llama_cpp: Any = importlib.import_module("llama_cpp")  # not in the development environment

TOLERANCE = 1e-3
F32_CACHE = 0  # GGML_TYPE_F32


def main() -> None:
    for case in GGUF_CASES:
        worst = _largest_difference(case)
        print(f"{case.name}: largest difference of a logit {worst:.1e}")
        if worst > TOLERANCE:
            raise SystemExit(f"{case.name}: llama.cpp reads another model than transformers")


def _largest_difference(case: GoldenCase) -> float:
    golden = json.loads((ROOT / "tests" / "goldens" / f"{case.name}.json").read_text())
    differences: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, case.config, case.seed)
        llama = llama_cpp.Llama(
            str(path),
            n_ctx=256,
            n_threads=1,
            logits_all=True,
            flash_attn=False,
            type_k=F32_CACHE,
            type_v=F32_CACHE,
            verbose=False,
        )
        for prompt in golden["prompts"]:
            llama.reset()
            llama.eval(prompt["prompt_ids"] + prompt["greedy_ids"])
            for position, row in prompt["logits"].items():
                expected = np.frombuffer(base64.b64decode(row), "<f4")
                differences.append(float(np.abs(llama.scores[int(position)] - expected).max()))
        llama.close()
    return max(differences)


if __name__ == "__main__":
    main()
