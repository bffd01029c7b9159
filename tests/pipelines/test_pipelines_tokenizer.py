"""The tokenizer that is trained from text.

Pinned: (1) any text comes back exactly; (2) a phrase is one token, wherever it stands, and leaves its neighbours alone;
(3) frequent words are one token together with the space before them; (4) the folder loads in transformers and encodes
alike; (5) the end-of-text token is dropped from decoded completions; (6) a vocabulary without room for all bytes is
refused; (7) training is deterministic; (8) many texts at once are encoded one like the other, whole.
"""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipelines.prompting import decoder, load_tokenizer, stop_token
from pipelines.tasks import ledger
from pipelines.templates import R1_PREAMBLE
from pipelines.tokenizer import END_OF_TEXT, PADDING, encode_texts, train_tokenizer

PHRASE = "Now let us begin:"
TEXTS = list(ledger.documents(ledger.make_rows(300, seed=0), random.Random(0)))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 512, [R1_PREAMBLE, PHRASE])


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    return ids


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_exactly(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text


PIECES = ["<think>", " </answer>", " 7", PHRASE, PHRASE[:-1], R1_PREAMBLE, END_OF_TEXT, " ", "\n", "\u00e9", "e\u0301",
          "\U0001f600", "\ufeff", "\u2028", "\x00", "#### 1,234", " ,", " n't"]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8))
def test_phrases_tags_and_spaces_come_back_exactly(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_every_document_comes_back_exactly(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [encode(tokenizer, text) for text in TEXTS]
    assert decoder(tokenizer)(ids) == TEXTS
    assert max(map(len, ids)) < 50, "a document is short, because its opening and its words are single tokens"


@pytest.mark.parametrize("phrase", [R1_PREAMBLE, PHRASE])
def test_a_phrase_is_one_token(tokenizer: PreTrainedTokenizerBase, phrase: str) -> None:
    [token] = encode(tokenizer, phrase)
    assert encode(tokenizer, f"x {phrase} y") == [*encode(tokenizer, "x "), token, *encode(tokenizer, " y")]
    assert encode(tokenizer, phrase + phrase) == [token, token]
    assert token not in encode(tokenizer, phrase[:-1])


@pytest.mark.parametrize("word", ["Keep", "digit:", "7", "+3", "x9", "what?", "<think>", "</answer>", "User:"])
def test_a_frequent_word_is_one_token_with_its_space(tokenizer: PreTrainedTokenizerBase, word: str) -> None:
    [token] = encode(tokenizer, f" {word}")
    assert encode(tokenizer, f" {word} {word}") == [token, token]


def test_words_are_never_merged_with_their_neighbours() -> None:
    tokenizer = train_tokenizer(["no way out"] * 100, 512, [])
    assert len(encode(tokenizer, "no way out")) == 3
    assert len(tokenizer) < 300, "the vocabulary ends where there is nothing left to merge"


def test_the_folder_loads_in_transformers(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() and len(again) == len(tokenizer)
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert (again.eos_token, again.pad_token) == (END_OF_TEXT, PADDING)
    spaced = "a , b . c n't"  # transformers can "clean up" spaces while decoding; that would change completions
    assert again.decode(encode(again, spaced)) == spaced


def test_ids_are_dense_and_special_tokens_come_first(tokenizer: PreTrainedTokenizerBase) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids([PADDING, END_OF_TEXT]) == [0, 1]


def test_the_end_of_text_is_not_part_of_a_completion(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [*encode(tokenizer, " <answer> 7 </answer>"), stop_token(tokenizer)]
    assert decoder(tokenizer)([ids, []]) == [" <answer> 7 </answer>", ""]


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerBase) -> None:
    assert train_tokenizer(TEXTS, 512, [R1_PREAMBLE, PHRASE]).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(("phrases", "smallest"), [([], 258), ([PHRASE], 259)])
def test_a_vocabulary_without_room_for_all_bytes_is_refused(phrases: list[str], smallest: int) -> None:
    tokenizer = train_tokenizer(TEXTS, smallest, phrases)
    assert len(tokenizer) == smallest and tokenizer.decode(encode(tokenizer, "\u00e9 7")) == "\u00e9 7"
    with pytest.raises(ValueError, match=f"vocab_size must be at least {smallest}.*got {smallest - 1}"):
        train_tokenizer(TEXTS, smallest - 1, phrases)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no tokenizer.json: give the folder of"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_end_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300, [])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(str(tmp_path))


def test_many_texts_at_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Also where the tokenizer's own file asks for short texts of equal length, as those of sentence encoders do."""
    tokenizer.save_pretrained(str(tmp_path))
    cutting = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cutting.enable_truncation(5)
    cutting.enable_padding(length=9)
    cutting.save(str(tmp_path / "tokenizer.json"))
    texts = [*TEXTS[:50], "", f"one {END_OF_TEXT} two"]
    encoded = encode_texts(load_tokenizer(str(tmp_path)), texts)
    assert [ids.tolist() for ids in encoded] == [encode(tokenizer, text) for text in texts]
