"""Subwords: pieces of words that a translator reads and writes, learned from text by sentencepiece."""

import io
from collections.abc import Iterable, Sequence

import numpy as np

from l2t_jax.data.sets import DataError

PAD, UNKNOWN, BEGIN, END = range(4)  # ids that are no piece of text
LEAST = 5  # ids: those and one piece


class Subwords:
    """A trained model: text to ids and back."""

    def __init__(self, model: bytes) -> None:
        """Take what `train_subwords` gave."""
        self._processor = _sentencepiece().SentencePieceProcessor(model_proto=model)
        self.size: int = self._processor.get_piece_size()  # V

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without begin and end."""
        found: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first END or PAD."""
        pieces = []
        for i in ids:
            if i in (END, PAD):
                break
            pieces.append(int(i))
        text: str = self._processor.decode(pieces)
        return text


def train_subwords(texts: Iterable[str], size: int) -> bytes:
    """Learn byte-pair pieces of texts; equal texts and sizes give equal models.

    Args:
      texts: of the training side only, both languages.
      size: V, the four ids that are no piece among them.
    Returns:
      the model, for `Subwords`, in sentencepiece's own format.
    Raises:
      DataError: the texts do not have so many pieces, or so few are too few for their letters.
    Source: Sennrich et al. 2016, by Kudo & Richardson 2018 (sentencepiece), which splits at spaces itself.
    """
    if not isinstance(size, (int, np.integer)) or size < LEAST:
        raise DataError(f"a vocabulary of {size} subwords holds no text: give at least {LEAST}.")
    model = io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=int(size),
            model_type="bpe",
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=BEGIN,
            eos_id=END,
            character_coverage=1.0,
            max_sentence_length=2**20,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(_told(size, str(error))) from error
    return model.getvalue()


def _told(size: int, error: str) -> str:
    if "too high" in error:
        most = error.rpartition("<=")[2].strip(" .")
        return f"the training text has fewer than {size} subwords: give a vocabulary of at most {most}."
    if "smaller than required_chars" in error:
        return f"the training text has more letters than the {size} subwords of the vocabulary: give a larger one."
    return (
        f"no vocabulary of {size} subwords could be learned from the training text ({' '.join(error.split())[:200]})."
    )


def _sentencepiece():  # type: ignore[no-untyped-def]
    try:
        import sentencepiece  # only translation needs it
    except ImportError:
        raise ImportError(
            "translation needs sentencepiece, which is not installed: pip install sentencepiece."
        ) from None
    return sentencepiece
