"""Text to token ids and back: a small WordPiece tokenizer, padding, word masking, and a store of ready-made ids.

WordPiece (Wu et al. 2016; BERT, section 3) keeps frequent words whole and spells rare ones from pieces: "umbrella" may
become `um ##bre ##lla`. The lessons keep the vocabulary so small that some content words do split ("kitten"), because
whole-word masking (ViLT, section 3.2) means nothing where every word is one token.

Shapes: B texts, L tokens of the batch's longest text, M texts in a table.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import LongTensor, Tensor

from minivlp.data.errors import DataError

PAD, UNK, CLS, SEP, MASK, ENC, DEC = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[ENC]", "[DEC]")
BERT_TOKENS = SPECIAL_TOKENS[:5]  # what every BERT vocabulary has; BLIP added the other two

DEFAULT_VOCAB_SIZE = 340  # splits about one content word in seven: the rarer names, such as kitten and cottage
DEFAULT_FILE = Path(__file__).resolve().parents[2] / "data" / "tokenizer.json"


class Tokenizer:
    """Lower-casing WordPiece with BERT's rules and seven special tokens.

    `[CLS] words [SEP]` is what `encode` returns. BLIP puts `[ENC]` or `[DEC]` in the place of `[CLS]`.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Wrap a `tokenizers.Tokenizer`; the class methods below make one. Raises DataError if it does not fit."""
        if not isinstance(tokenizer.model, models.WordPiece):
            raise DataError("this is not a WordPiece tokenizer: load a file that Tokenizer.save has written")
        ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
        if missing := [token for token, i in zip(SPECIAL_TOKENS, ids, strict=True) if i is None]:
            raise DataError(f"the tokenizer lacks {' '.join(missing)}: load a file that Tokenizer.save has written")
        self._tokenizer = tokenizer
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id, self.enc_id, self.dec_id = ids
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.special_ids: tuple[int, ...] = tuple(ids)

        names = [tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        self._continues = torch.tensor([name.startswith("##") for name in names])  # (V,) pieces inside a word
        self._special = torch.zeros(self.vocab_size, dtype=torch.bool)
        self._special[list(ids)] = True

    # ---- making one ----

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int = DEFAULT_VOCAB_SIZE) -> Tokenizer:
        """Learn a vocabulary of at most `vocab_size` tokens, special ones included.

        The result depends on the texts alone, not on their order or on the run. Every printable ASCII character
        gets a token, so that English text never meets `[UNK]`. Raises DataError on empty input or a vocabulary too
        small for the characters alone.
        """
        texts = sorted(texts)
        if not any(text.strip() for text in texts):
            raise DataError("a tokenizer needs texts to learn from, but none of those given has any words")
        letters = sorted(set(string.printable.lower()) - set(string.whitespace))
        # The trainer numbers the inner letters "##a", "##b" in the random order of a hash map and breaks ties by
        # number. Handing them over as fixed tokens is what makes two runs agree.
        fixed = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters if letter.isalnum())]
        if vocab_size < len(fixed):
            raise DataError(f"vocab_size={vocab_size} is too small: characters and special tokens take {len(fixed)}")
        learner = _wordpiece({UNK: 0})
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=fixed, limit_alphabet=len(letters), show_progress=False
        )
        learner.train_from_iterator(texts, trainer)
        return cls(_wordpiece(learner.get_vocab()))

    @classmethod
    def default(cls) -> Tokenizer:
        """The course's tokenizer, from `data/tokenizer.json`.

        Where the package was installed without the repository's `data` folder, the same tokenizer is learnt again
        from the picture book's words (a few seconds).
        """
        return cls.load(DEFAULT_FILE) if DEFAULT_FILE.exists() else cls.train(picturebook_texts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a file written by `save`. Raises DataError if it is missing or something else."""
        text = _read(path, "a tokenizer.json that Tokenizer.save has written")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception for every malformed file
            raise DataError(f"{path} is no tokenizer file: give a tokenizer.json that Tokenizer.save wrote") from error
        return cls(tokenizer)

    @classmethod
    def from_bert_vocab(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Use an existing BERT vocabulary, `vocab.txt` with one token a line, for example of bert-base-uncased.

        `[DEC]` and then `[ENC]` are added at the end where absent: 30522 and 30523 there, the ids of the official
        BLIP. Raises DataError if the file is missing or is no BERT vocabulary.
        """
        lines = _read(path, "a BERT vocab.txt, one token a line").splitlines()
        vocab = {line.strip(): i for i, line in enumerate(lines)}
        if len(vocab) != len(lines) or not vocab.keys() >= set(BERT_TOKENS):
            raise DataError(
                f"{path} is not a BERT vocabulary: give a vocab.txt with one different token a line, "
                f"{' '.join(BERT_TOKENS)} among them"
            )
        for token in (DEC, ENC):
            vocab.setdefault(token, len(vocab))
        return cls(_wordpiece(vocab))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one json file, readable by `load` and by the `tokenizers` library."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True) + "\n", encoding="utf-8", newline="\n")

    # ---- using it ----

    def encode(self, text: str) -> list[int]:
        """`[CLS]`, the ids of the text's pieces, `[SEP]`. Raises DataError if the text is empty or is no text."""
        return self._encode([text])[0]

    def encode_batch(self, texts: Sequence[str], *, max_length: int | None = None) -> tuple[LongTensor, Tensor]:
        """Ids (B, L) and a mask (B, L), True at tokens and False at padding; L is the longest text of this batch.

        A text longer than `max_length` is cut and keeps its `[SEP]`. Raises DataError if a text is empty.
        """
        rows = self._encode(texts)
        if max_length is not None:
            if max_length < 3:
                raise DataError(f"max_length={max_length} leaves no room for words: use 3 or more")
            rows = [row if len(row) <= max_length else [*row[: max_length - 1], self.sep_id] for row in rows]
        return pad(rows, self.pad_id)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """One text (L,) back from its ids, without special tokens; pieces are joined and the case is lost."""
        return self._tokenizer.decode(torch.as_tensor(ids).tolist(), skip_special_tokens=True)

    def tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        """The name of every id of one text (L,), special tokens included."""
        return [self._tokenizer.id_to_token(i) for i in torch.as_tensor(ids).tolist()]

    def word_groups(self, ids: Tensor | Sequence[Sequence[int]]) -> LongTensor:
        """For each position (B, L) the number of its word in the text, counted from 0; -1 at special tokens.

        Pieces of a word share its number: `[CLS] a um ##bre ##lla . [SEP] [PAD]` gives -1 0 1 1 1 2 -1 -1.
        Whole-word masking (ViLT, section 3.2) masks all positions of a number together.
        """
        ids = torch.as_tensor(ids)
        special = self._special.to(ids.device)[ids]
        inside = self._continues.to(ids.device)[ids]
        inside[..., 1:] &= ~special[..., :-1]  # a piece after a special token has lost its beginning: a word of its own
        inside[..., 0] = False
        starts = ~special & ~inside
        return (starts.long().cumsum(-1) - 1).masked_fill(special, -1)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str):
            raise DataError("encode_batch takes a list of texts: use encode for a single one")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {i} is a {type(text).__name__}: only strings can be encoded")
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        for i, row in enumerate(rows):
            if len(row) == 2:  # [CLS] and [SEP] alone
                raise DataError(f"text {i} is empty ({texts[i]!r}): leave it out before encoding")
        return rows

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"


class TokenTable:
    """All captions of a data set as ids, made once, so that a training step only looks rows up.

    `captions` has one caption or a list of captions per picture; the ids of all M captions are one tensor (M, L).
    """

    def __init__(
        self, captions: Sequence[str] | Sequence[Sequence[str]], tokenizer: Tokenizer, *, max_length: int | None = None
    ) -> None:
        """Encode every caption; raises DataError if a picture has none or one is empty."""
        groups = [[group] if isinstance(group, str) else list(group) for group in captions]
        if not groups or not all(groups):
            raise DataError("every picture needs at least one caption: leave out those that have none")
        self.counts = torch.tensor([len(group) for group in groups])  # (N,) captions of each picture
        self.first = self.counts.cumsum(0) - self.counts  # (N,) row of its first caption
        self.ids, mask = tokenizer.encode_batch([text for group in groups for text in group], max_length=max_length)
        self.lengths = mask.sum(1)  # (M,)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.counts)

    def __call__(self, pictures: Tensor, caption: int | Tensor = -1) -> tuple[LongTensor, Tensor]:
        """Ids (B, L) and mask (B, L) for the pictures (B,), cut to the longest of them.

        `caption` says which of a picture's captions, one number for all or one each (B,), taken modulo how many the
        picture has; -1 is the last, in the picture book the fullest.
        """
        pictures = torch.as_tensor(pictures, device=self.ids.device)
        caption = torch.as_tensor(caption, device=self.ids.device)
        rows = self.first[pictures] + caption % self.counts[pictures]
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        mask = torch.arange(longest, device=self.ids.device) < lengths[:, None]
        return self.ids[rows, :longest], mask

    def to(self, device: torch.device | str) -> TokenTable:
        """The same table with its tensors on `device`."""
        moved = object.__new__(TokenTable)
        for name in ("counts", "first", "ids", "lengths"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved


def mask_words(
    ids: Tensor, tokenizer: Tokenizer, *, generator: torch.Generator, share: float = 0.15, whole_word: bool = True
) -> tuple[LongTensor, LongTensor]:
    """Hide words to be guessed (BERT, 3.1): ids (B, L) -> corrupted ids (B, L) and labels (B, L), -100 where not asked.

    Each word is chosen with probability `share`, and with it all its pieces (ViLT, 3.3); `whole_word=False` chooses
    each piece by itself. Of the chosen tokens 80 % become `[MASK]`, 10 % a random ordinary token, 10 % stay. Special
    tokens and padding are never chosen. All random numbers come from `generator`, on the CPU like `ids`.
    """
    words = tokenizer.word_groups(ids)  # (B, L)
    chance = torch.rand(ids.shape, generator=generator)
    if whole_word:
        chance = chance.gather(1, words.clamp(min=0))  # all pieces of word k share the k-th number
    chosen = (chance < share) & (words >= 0)
    fate = torch.rand(ids.shape, generator=generator)
    ordinary = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids])
    others = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)]
    corrupted = torch.where(chosen & (fate < 0.8), tokenizer.mask_id, ids)
    corrupted = torch.where(chosen & (fate >= 0.9), others, corrupted)
    return corrupted, torch.where(chosen, ids, -100)


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[LongTensor, Tensor]:
    """Lists of ids -> ids (B, L) filled up with `pad_id`, and the mask (B, L), True at the lists' own ids."""
    if not rows:
        raise DataError("there is nothing to pad: give at least one list of ids")
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], dtype=torch.long)
    return ids, torch.arange(longest) < lengths[:, None]


def picturebook_texts(pictures: int = 3000) -> list[str]:
    """What the default tokenizer learns from: captions, questions and answers of training scenes, not drawn."""
    from minivlp.data.picturebook.describe import captions
    from minivlp.data.picturebook.questions import questions
    from minivlp.data.picturebook.sample import sample
    from minivlp.data.picturebook.world import TIERS

    texts: list[str] = []
    for index in range(pictures):
        scene = sample(index, split="train", tier=TIERS[index % len(TIERS)], seed=0)
        texts += captions(scene)
        for item in questions(scene):
            texts += (item.question, item.answer)
    return texts


def _wordpiece(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """BERT's rules around a vocabulary: clean and lower-case, split at spaces and punctuation, then WordPiece."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    if CLS in vocab:  # a tokenizer that is about to be trained has no special tokens yet
        ends = [(token, vocab[token]) for token in (CLS, SEP)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=ends
        )
        tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocab])
    return tokenizer


def _read(path: str | os.PathLike[str], wanted: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: give {wanted}") from error
