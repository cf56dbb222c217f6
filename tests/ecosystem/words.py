"""Texts, and a tokenizer of their words that is made here."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

__all__ = ["TEXTS", "word_tokenizer"]

_WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "red", "big"]
TEXTS = [" ".join(_WORDS[(i * k) % len(_WORDS)] for k in range(1, 9)) for i in range(1, 17)]


def word_tokenizer() -> Any:
    """13 tokens; `<pad>` is 0 and `<eos>` 1."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *_WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
