"""The two tokenizers of the demo: every word of the grammar is one token, everything else falls into characters.

Both are written down by rule instead of trained, so that they come out the same in every process. Neither tells
small letters from capitals: the CLIP tokenizer lowers the case, and the T5 tokenizer knows every spelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5Tokenizer

from grammar import WORDS

CHARACTERS = tuple(chr(code) for code in range(33, 127))
CLIP_LENGTH = 16
T5_LENGTH = 512
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
SPACE = "\u2581"


def spellings(word: str) -> list[str]:
    """Every mixture of small and capital letters, each one T5 token of its own; all small first."""
    return ["".join(letters) for letters in product(*zip(word.lower(), word.upper(), strict=True))]


def merged(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges to one word, the earliest known merge first.

    Args:
        symbols: The word's symbols.
        ranks: Known merges, each with its place in the order.

    Returns:
        The symbols that no known merge joins.
    """
    while True:
        known = [(ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not known:
            return symbols
        place = min(known)[1]
        symbols = [*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :]]


def clip_tokenizer() -> CLIPTokenizer:
    """Byte pairs: each word adds the merges, from the left, that it still needs; the tokenizer lowers the case."""
    vocabulary = {CLIP_BOS: 0, CLIP_EOS: 1}
    for character in sorted(ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
        vocabulary[character + WORD_END] = len(vocabulary)
    ranks: dict[tuple[str, str], int] = {}
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + WORD_END]
        while len(symbols := merged(symbols, ranks)) > 1:
            ranks[symbols[0], symbols[1]] = len(ranks)
            vocabulary[symbols[0] + symbols[1]] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=list(ranks), model_max_length=CLIP_LENGTH)


def t5_tokenizer(words: Sequence[str] = WORDS) -> T5Tokenizer:
    """Whole words first, single characters as a costly fallback."""
    entries = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -6.0)]
    entries += [(SPACE + spelling, -1.0) for word in words for spelling in spellings(word)]
    entries += [(character, -8.0) for character in CHARACTERS]
    return T5Tokenizer(vocab=entries, extra_ids=0, model_max_length=T5_LENGTH)
