"""Tokenizers made on the spot: real transformers classes over a vocabulary of a few hundred words.

Every text can be encoded (letters and bytes are in the vocabulary), and the words of `WORDS` become one
token each. Those of the system prompts of the pipelines are among them, as they are in the real vocabularies:
that matters where a pipeline cuts its own prompt template off after a fixed number of tokens.
"""

from __future__ import annotations

import itertools
import string
from typing import Any

_PLAIN = (
    "a an the and or of in on at by for to with is be are that from about any all some few "
    "red green blue yellow orange purple black white grey brown pink small large round square "
    "circle triangle star fox cat dog bird tree house river boat moon sun mountain city street "
    "left right under over near behind sleeping running falling loud quiet rain drum piano blurry low "
    "quality word"
)
_FROM_TEMPLATES = (
    "Describe describing image video detailing color shape size texture quantity text spatial relationships "
    "objects background You helpful assistant following aspects main content theme Actions events behaviors "
    "temporal physical movement changes environment light style atmosphere camera angles movements "
    "transitions used reasons descriptions give structured responses focusing object attribution actions "
    "without speculation The designed generate superior images degree alignment based textual prompts user "
    "Prompt Start"
)
WORDS = (*_PLAIN.split(), *_FROM_TEMPLATES.split())
_OPENING_WORDS = ("system", "user", "assistant", "Describe", "You", "The", "think")
_LETTERS = string.ascii_letters + string.digits + string.punctuation + "\n"
_ROLES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PARTS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[SYSTEM_PROMPT]' if message.role == 'system' else '[INST]' }}"
    "{% for part in message.content %}{{ '[IMG]' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '[/SYSTEM_PROMPT]' if message.role == 'system' else '[/INST]' }}{% endfor %}"
)


def _byte_letters() -> list[str]:
    """Returns the 256 letters by which byte-level tokenizers write bytes, in the order of the bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _learn(words: list[list[str]]) -> list[tuple[str, str]]:
    """Makes the merges that turn each word into one token.

    A word is merged as far as the merges of the words before it go, then from the left. Later merges rank
    lower, so they leave the earlier words as they are.

    Args:
        words: Each word as its list of letters.

    Returns:
        The merges by rank.
    """
    ranks: dict[tuple[str, str], int] = {}
    for letters in words:
        pieces = list(letters)
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            ranks.setdefault(pairs[at], len(ranks))
            pieces[at : at + 2] = ["".join(pairs[at])]
    return list(ranks)


def _vocabulary(letters: list[str], words: list[list[str]]) -> dict[str, Any]:
    """Returns the `vocab` and `merges` arguments of a byte pair tokenizer."""
    merges = _learn(words)
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in merges)])
    return {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}


def clip(length: int = 16) -> Any:
    """Returns a `CLIPTokenizer`.

    Args:
        length: The longest text in tokens, to which the pipelines pad.

    Returns:
        The tokenizer.
    """
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    letters += [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    words = [[*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(map(str.lower, WORDS))]
    return CLIPTokenizer(**_vocabulary(letters, words), model_max_length=length)


def t5(length: int = 48) -> Any:
    """Returns a `T5Tokenizer`, unigram pieces after three special tokens.

    Args:
        length: The longest text in tokens.

    Returns:
        The tokenizer.
    """
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    pieces += [(letter, -8.0) for letter in _LETTERS.strip()]
    pieces += [("\u2581" + word, -5.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def byt5() -> Any:
    """Returns a `ByT5Tokenizer`: bytes after three special tokens, no files at all."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def qwen2(length: int = 1024) -> Any:
    """Returns a `Qwen2Tokenizer` with the chat marks and a chat template.

    Args:
        length: The longest text in tokens.

    Returns:
        The tokenizer.
    """
    from transformers import Qwen2Tokenizer

    space = "\u0120"
    words = [[space, *word] for word in WORDS] + [list(word) for word in _OPENING_WORDS]
    words += [[space * n, space * n] for n in (1, 2, 4)]
    vocabulary = _vocabulary([*_byte_letters(), "<|endoftext|>"], words)
    return Qwen2Tokenizer(
        **vocabulary,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|image_pad|>"],
        chat_template=_ROLES,
        model_max_length=length,
    )


def gemma(length: int = 256) -> Any:
    """Returns a `GemmaTokenizer`: it begins each text with a mark and pads on the left.

    Args:
        length: The longest text in tokens.

    Returns:
        The tokenizer.
    """
    from transformers import GemmaTokenizer

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    return GemmaTokenizer(**_sentence_pieces(specials), add_bos_token=True, model_max_length=length)


def mistral(length: int = 512) -> Any:
    """Returns a `LlamaTokenizer` in Mistral's manner: instruction marks and a template over lists of parts.

    Args:
        length: The longest text in tokens.

    Returns:
        The tokenizer.
    """
    from transformers import LlamaTokenizer

    return LlamaTokenizer(
        **_sentence_pieces(["<unk>", "<s>", "</s>", "<pad>"]),
        pad_token="<pad>",
        additional_special_tokens=[
            *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        ],
        chat_template=_PARTS,
        model_max_length=length,
    )


def _sentence_pieces(specials: list[str]) -> dict[str, Any]:
    """Returns the `vocab` and `merges` of a sentence-piece tokenizer that falls back to bytes."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [["\u2581", *word] for word in WORDS]
    return _vocabulary([*specials, *fallback, "\u2581", *_LETTERS], words)
