"""A byte-level vocabulary that shows where a pre-tokenizer cuts, and strings to cut.

Every pair of its alphabet's characters is a merge, so two neighbours become one token unless the
pre-tokenizer separates them. tools/make_tokenizer_goldens.py asks llama.cpp about it.
"""

from itertools import pairwise
from typing import Any

from support.tiny_tokenizer import byte_alphabet

PRE_TOKENIZERS = ("gpt-2", "smollm", "qwen2")
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_TOKENS = ("<tool>", "<tool_call>")
_ALPHABET = " \n\r\t'.,!()<|>_-0123456789aeinorstvmldTSE"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def boundary_metadata(pre_tokenizer: str) -> dict[str, Any]:
    """Return the tokenizer's part of a GGUF file's metadata."""
    characters = byte_alphabet()
    merged = [characters[ord(c)] for c in _ALPHABET]
    # the bytes of é, 日, 本, 🎉 and of a combining acute accent, in order
    spelled = [characters[byte] for byte in "é日本🎉\u0301".encode()]
    pairs = [(a, b) for a in merged for b in merged]
    pairs += [(a, b) for a, b in pairwise(spelled) if (a, b) not in pairs]
    tokens = [*CONTROL_TOKENS, *USER_TOKENS, *characters, *(a + b for a, b in pairs)]
    types = [_CONTROL] * len(CONTROL_TOKENS) + [_USER_DEFINED] * len(USER_TOKENS)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types + [_NORMAL] * (len(tokens) - len(types)),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairs],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


STRINGS = (
    "The capital of France is",
    " leading space",
    "trailing space ",
    "two  spaces   three    four",
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    " \n \n ",
    "\t",
    "\ttabbed\t\ttwice \t mixed",
    "line one\nline two\r\nline three\rline four",
    "ends in newlines\n\n",
    "a \n b  \n\n  c",
    "0 12 345 6789 1234567890",
    "3.14159, 1e-10, 0xFF and 1,000,000.00",
    "year2024 model3b v1.2.3 10x",
    "½ ² Ⅷ ٣٤ 一二三",
    "I'm you're they've he'll she'd it's don't",
    "I'M YOU'RE THEY'VE HE'LL SHE'D IT'S DON'T",
    "'quoted' 's 't're''ve 'x",
    "rock'n'roll o'clock d'être",
    "emoji 🎉 party 👩‍👩‍👧‍👦 family 🇫🇷 flag 👍🏽 skin",
    "🎉🎉🎉",
    "日本語のテキスト、全角　空白。",
    "中文字符和English混合123",
    "한국어 문장입니다.",
    "Привет, мир! Ελληνικά κείμενα",
    "مرحبا بالعالم שלום עולם",
    "हिन्दी में पाठ ภาษาไทย",
    "cafe\u0301 na\u0131\u0308ve e\u0301\u0302 combining",
    "café naïve über Straße",
    "zero\u200bwidth and\u00a0no-break",
    "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "text<|im_end|>more <|im_end|> spaced",
    "<tool>inner</tool> <tool_call>x",
    "<|im_start|",
    "not <|special|> at all",
    "def f(x):\n    return x ** 2  # square\n",
    'if (a && b || !c) { printf("%d\\n", x->y); }',
    "<html><body class='x'>&nbsp;</body></html>",
    "SELECT * FROM t WHERE a<=1 AND b!='z';",
    "https://example.org/path?q=1&r=2#frag user@mail.com",
    "!!! ??? ... --- ___ ,,, ;;;",
    "(a)[b]{c}<d>«e»“f”‘g’",  # noqa: RUF001
    "a" * 200,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "antidisestablishmentarianism " * 6,
    "MiXeD CaSe WORDS camelCase snake_case kebab-case",
    "x=1;y=2;z=x+y;print(z)//done",
    "$100 €50 £20 ¥1000 100% #1 @home",
    "end.",
)
