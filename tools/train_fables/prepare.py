"""Tokenizer and token files: the text of `corpus.py` as what training reads.

    python -m tools.train_fables.prepare OUT [--megabytes 70]

OUT/tokenizer.json; OUT/train.npz, seed.npz, held-out.npz, each: tokens uint16 (every document
ends in END), starts int64 (of documents), domains int8, nats float32 and chars int32 (of each).
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tools.train_fables.chat import CHAT_TEMPLATE, END, SPECIAL_TOKENS
from tools.train_fables.corpus import DOMAINS, Document, documents

VOCAB_SIZE = 3072
TOKENIZER_DOCUMENTS = 12_000
VALIDATION_DOCUMENTS = 1_500
_BATCH = 2_000


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Return a byte-level BPE with single digits and the chat's special tokens, END first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenise(tokenizer: tokenizers.Tokenizer, texts: list[Document]) -> dict[str, np.ndarray]:
    """Return the arrays of a token file."""
    encoded = tokenizer.encode_batch([d.text + END for d in texts], add_special_tokens=False)
    lengths = np.array([len(e.ids) for e in encoded])
    names = list(DOMAINS)
    return {
        "tokens": np.concatenate([np.array(e.ids, np.uint16) for e in encoded]),
        "starts": np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64),
        "domains": np.array([names.index(d.domain) for d in texts], np.int8),
        "nats": np.array([d.nats for d in texts], np.float32),
        "chars": np.array([len(d.text) for d in texts], np.int32),
    }


def write_split(out: Path, tokenizer: tokenizers.Tokenizer, split: str, num_chars: int) -> None:
    """Write one split: so many characters of training text, or the validation documents."""
    stream = documents(split)
    parts: list[dict[str, np.ndarray]] = []
    while True:
        count = _BATCH if split == "train" else VALIDATION_DOCUMENTS
        parts.append(tokenise(tokenizer, list(itertools.islice(stream, count))))
        if split != "train" or sum(int(p["chars"].sum()) for p in parts) >= num_chars:
            break
    offsets = np.cumsum([0] + [p["tokens"].size for p in parts])
    for part, offset in zip(parts, offsets[:-1], strict=True):
        part["starts"] += offset
    whole = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    np.savez(out / f"{split}.npz", allow_pickle=False, **whole)
    print(
        f"{split}: {whole['starts'].size:,} documents, {whole['tokens'].size:,} tokens, "
        f"{whole['chars'].sum() / whole['tokens'].size:.2f} characters a token, "
        f"at most {whole['nats'].sum() / whole['tokens'].size:.3f} nats a token",
        flush=True,
    )


def main() -> None:
    """Make everything that training reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=int, default=70)
    args = parser.parse_args()
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    texts = [d.text for d in itertools.islice(documents("train"), TOKENIZER_DOCUMENTS)]
    for token in SPECIAL_TOKENS:
        texts = [text.replace(token, "\n") for text in texts]
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": END, "chat_template": CHAT_TEMPLATE}, indent=1) + "\n"
    )
    write_split(args.out, tokenizer, "seed", 0)
    write_split(args.out, tokenizer, "held-out", 0)
    write_split(args.out, tokenizer, "train", args.megabytes * 1_000_000)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
