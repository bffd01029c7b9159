"""Trains a small byte-level BPE tokenizer from text, for models that are pretrained from nothing.

Any text can be encoded (unknown words fall back to bytes) and decoded back exactly. A word keeps the space before it
and is never merged with its neighbour, so frequent words end up as single tokens.

    tokenizer = train_tokenizer(texts, vocab_size=512, phrases=[R1_PREAMBLE])
"""

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|end|>"
PADDING = "<|pad|>"
_ENCODED_AT_ONCE = 20_000


def train_tokenizer(texts: Iterable[str], vocab_size: int, phrases: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over words with their leading space, at most `vocab_size` tokens (at least the 256 bytes).

    Each of `phrases` becomes one token: text that opens every document verbatim would otherwise fill most of a short
    sequence with constants.
    """
    if vocab_size < 256 + 2 + len(phrases):
        raise ValueError(
            f"vocab_size must be at least {258 + len(phrases)} (256 bytes and the special tokens), got {vocab_size}"
        )

    def without_phrases() -> Iterable[str]:
        for text in texts:
            for phrase in phrases:
                text = text.replace(phrase, "")
            yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(r" ?\S+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(phrases),
        special_tokens=[PADDING, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(without_phrases(), trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING, clean_up_tokenization_spaces=False
    )


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """[tokens] int32 for each text, without special tokens; on all cores, unless TOKENIZERS_PARALLELISM forbids it."""
    encoded: list[np.ndarray] = []
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        part = list(texts[start : start + _ENCODED_AT_ONCE])
        batch = tokenizer(part, add_special_tokens=False, return_attention_mask=False)
        encoded += [np.array(ids, np.int32) for ids in batch["input_ids"]]
    return encoded
