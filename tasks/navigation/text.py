"""Instructions as numbers: the word vocabulary of R2R's baselines and word pieces of BERT."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tasks.core.data import DataError
from tasks.core.errors import UserError, expect

PAD, UNK, EOS, BOS = "<PAD>", "<UNK>", "<EOS>", "<BOS>"
CLS_PIECE, SEP_PIECE, UNK_PIECE, PAD_PIECE = "[CLS]", "[SEP]", "[UNK]", "[PAD]"
TURN = "[sep]"  # between the turns of a dialogue


def split_sentence(sentence: str) -> list[str]:
    """Lower-case words and punctuation marks.

    Chunks of nothing but punctuation are split into marks, runs of dots stay whole; a chunk that also holds spaces
    stays whole too (``"; ("``), as in R2R's own code.
    """
    words: list[str] = []
    for chunk in re.split(r"(\W+)", sentence.strip()):
        word = chunk.strip().lower()
        only_marks = all(letter in string.punctuation for letter in word)
        words += list(word) if only_marks and not all(letter == "." for letter in word) else [word]
    return [word for word in words if word]


def build_vocabulary(sentences: Iterable[str], min_count: int = 5) -> list[str]:
    """``<PAD>``, ``<UNK>``, ``<EOS>``, then the words that occur at least `min_count` times, most frequent first."""
    counts = Counter(word for sentence in sentences for word in split_sentence(sentence))
    return [PAD, UNK, EOS, *(word for word, count in counts.most_common() if count >= min_count)]


def read_vocabulary(path: Path) -> list[str]:
    """The lines of a vocabulary file; raises `DataError` if there are none or one occurs twice."""
    try:
        words = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a vocabulary, one word per line") from None
    repeated = [word for word, count in Counter(words).items() if count > 1]
    if not any(words) or repeated:
        problem = f"{repeated[0]!r} occurs twice" if repeated else "is empty"
        raise DataError(f"{path}: {problem}; expected different words, one per line")
    return words


class WordTokenizer:
    """R2R's word tokenizer, which reverses a sentence, or with `begin` ORIST's, which begins it with ``<BOS>``."""

    def __init__(self, vocabulary: Sequence[str], length: int, begin: bool = False) -> None:
        expect("text length", length, length >= 2, "at least 2 words")
        self.length = length
        self.begin = begin
        self.index = {word: number for number, word in enumerate([*vocabulary, *([BOS] if begin else [])])}

    def encode(self, sentence: str) -> list[int]:
        """Exactly `length` numbers: the words and ``<EOS>``, cut or padded."""
        numbers = [self.index.get(word, self.index[UNK]) for word in split_sentence(sentence)]
        end = self.index[EOS]
        if self.begin:
            if not numbers:
                raise UserError("an empty sentence has no words to encode")
            numbers = [self.index[BOS], *numbers[: self.length - 2], end]
        else:
            numbers = [*reversed(numbers), end][: self.length]
        return numbers + [self.index[PAD]] * (self.length - len(numbers))


class WordPieces:
    """Word pieces from a BERT vocabulary file, as ORIST cuts them.

    Text is lower-cased whatever the vocabulary and split at spaces first; the word ``[sep]`` between the turns of a
    dialogue is the separator. Words of `extra`, a data set's own vocabulary, that the file does not hold are appended
    to it as whole words; they are matched as such.

    Args:
        pieces: The word pieces in their order, ``[PAD]``, ``[UNK]``, ``[CLS]`` and ``[SEP]`` among them.
        max_text: Longest encoding, ``[CLS]`` and ``[SEP]`` included.
        extra: Words to append.
    """

    def __init__(self, pieces: Sequence[str], max_text: int = 80, extra: Sequence[str] = ()) -> None:
        expect("max_text", max_text, max_text >= 3, "at least 3 word pieces")
        missing = [piece for piece in (PAD_PIECE, UNK_PIECE, CLS_PIECE, SEP_PIECE) if piece not in pieces]
        if missing:
            raise DataError(f"the word pieces lack {', '.join(missing)}; expected the vocabulary of a BERT")
        known = set(pieces)
        self.pieces = [*pieces, *dict.fromkeys(word for word in extra if word not in known)]
        self.max_text = max_text
        self._index = {piece: number for number, piece in enumerate(self.pieces)}
        self._whole = set(self.pieces[len(pieces) :])
        self._model = _word_piece_model(self._index)
        self._cut: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> tuple[int, ...]:
        """``[CLS]``, word pieces, ``[SEP]``: at most `max_text` ids, not padded."""
        ids = [self._index[CLS_PIECE]]
        for word in text.lower().split():
            ids += self._ids_of(word)
            if len(ids) >= self.max_text:
                break
        return (*ids[: self.max_text - 1], self._index[SEP_PIECE])

    def is_cut(self, text: str) -> bool:
        """Whether an instruction has more word pieces than `encode` keeps."""
        return sum(len(self._ids_of(word)) for word in text.lower().split()) > self.max_text - 2

    @property
    def unknown(self) -> int:
        """The id that stands for words of unknown pieces."""
        return self._index[UNK_PIECE]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The piece of each id."""
        return [self.pieces[number] for number in ids]

    def _ids_of(self, word: str) -> list[int]:
        if word not in self._cut:
            if word == TURN:
                self._cut[word] = [self._index[SEP_PIECE]]
            elif word in self._whole:
                self._cut[word] = [self._index[word]]
            else:
                self._cut[word] = self._model.encode(word, add_special_tokens=False).ids
        return self._cut[word]


def _word_piece_model(index: dict[str, int]) -> Any:
    """BERT's basic and word-piece tokenization, case kept, through the `tokenizers` package."""
    try:
        from tokenizers import Tokenizer, normalizers, pre_tokenizers
        from tokenizers.models import WordPiece
    except ImportError:
        raise UserError("word pieces need the package tokenizers: pip install 'frugal-vision[navigation]'") from None
    tokenizer = Tokenizer(WordPiece(index, unk_token=UNK_PIECE, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def read_word_pieces(path: Path) -> list[str]:
    """The word pieces of a BERT vocabulary file (``vocab.txt``, one per line)."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected the vocabulary of a BERT, one piece per line"
        ) from None
    pieces = [line.rstrip("\r") for line in lines]
    while pieces and not pieces[-1]:
        pieces.pop()
    if len(set(pieces)) < len(pieces):
        repeated = next(piece for piece, count in Counter(pieces).items() if count > 1)
        raise DataError(f"{path}: {repeated!r} occurs twice; expected different word pieces, one per line")
    return pieces
