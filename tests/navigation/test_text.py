import sys

import pytest

from tasks.core.data import DataError
from tasks.core.errors import UserError
from tasks.navigation.text import (
    WordPieces,
    build_vocabulary,
    read_vocabulary,
    read_word_pieces,
    split_sentence,
)

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "walk", "bath", "##room", "past", "."]


def test_instructions_become_word_pieces():
    pieces = WordPieces(PIECES, max_text=8)
    ids = pieces.encode("Walk past the bathroom.")
    assert pieces.decode(ids) == ["[CLS]", "walk", "past", "[UNK]", "bath", "##room", ".", "[SEP]"]
    assert not pieces.is_cut("Walk past the bathroom.")
    longer = "walk past walk past walk past walk"
    assert pieces.decode(pieces.encode(longer)) == ["[CLS]", *["walk", "past"] * 3, "[SEP]"]
    assert pieces.is_cut(longer)
    assert pieces.encode("") == (2, 3)


def test_words_of_the_data_set_are_added_whole():
    pieces = WordPieces(PIECES, extra=["walk", "bedroom", "sofa"])
    assert len(pieces) == len(PIECES) + 2
    assert pieces.decode(pieces.encode("bedroom [SEP] Sofa")) == ["[CLS]", "bedroom", "[SEP]", "sofa", "[SEP]"]


def test_vocabularies_count_words():
    sentences = ["Go left, go left...", "go up?!"]
    assert split_sentence(sentences[0]) == ["go", "left", ",", "go", "left", "..."]
    assert build_vocabulary(sentences, min_count=2) == ["<PAD>", "<UNK>", "<EOS>", "go", "left"]


def test_unusable_vocabularies(tmp_path):
    path = tmp_path / "vocab.txt"
    for content, read, message in [
        ("a\nb\na\n", read_word_pieces, "'a' occurs twice"),
        ("a\na\n", read_vocabulary, "'a' occurs twice"),
        ("\n", read_vocabulary, "is empty"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError, match=f"{path}: {message}"):
            read(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_word_pieces(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"the word pieces lack \[SEP\]"):
        WordPieces(["[PAD]", "[UNK]", "[CLS]"])
    with pytest.raises(UserError, match="max_text: 2 was given"):
        WordPieces(PIECES, max_text=2)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'frugal-vision\[navigation\]'"):
        WordPieces(PIECES)
