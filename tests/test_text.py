"""The tokenizer: training, files, padding, word groups, and agreement with transformers' BERT."""

from __future__ import annotations

import itertools

import pytest
import torch

from minivlp.data import DataError, Tokenizer, TokenTable, mask_words
from minivlp.data import text as text_module
from minivlp.data.text import SPECIAL_TOKENS, pad, picturebook_texts

TEXTS = [
    "a red balloon over the house",
    "two red balls and a small umbrella",
    "a big house and a small house",
    "the balloon is red, the ball is red",
    "an umbrella on the beach at night",
]
BERT_WORDS = [*SPECIAL_TOKENS[:5], "a", "un", "##believ", "##able", "cafe", "cat", "##s", ",", "'", "t", "don", "-"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=140)


@pytest.fixture
def bert_vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT_WORDS) + "\n", encoding="utf-8")
    return path


def test_special_tokens_come_first_in_the_agreed_order(tokenizer):
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id)
    assert (*ids, tokenizer.mask_id, tokenizer.enc_id, tokenizer.dec_id) == tuple(range(7))
    assert tokenizer.tokens(range(7)) == list(SPECIAL_TOKENS)


def test_encode_and_decode(tokenizer):
    ids = tokenizer.encode("A Red  Umbrélla!")
    assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    assert tokenizer.decode(ids) == "a red umbrella!"
    assert tokenizer.decode(torch.tensor(ids)) == "a red umbrella!"
    assert tokenizer.vocab_size == len(tokenizer) == 140


def test_every_ascii_text_is_spelt_without_unknown_tokens(tokenizer):
    text = 'Zebra_99.JPG: 50% off @home (really?) #1 \\o/ ~x^y~ {z} [q] <w> `k` "j" $5 & more | less; a=b*c/d+e-f'
    assert tokenizer.unk_id not in tokenizer.encode(text)
    assert tokenizer.unk_id in tokenizer.encode("猫")


def test_special_tokens_written_in_a_text_are_recognised(tokenizer):
    assert tokenizer.encode("a [MASK] house")[2] == tokenizer.mask_id


def test_training_depends_on_the_texts_alone():
    # Frequencies tie here in many places: a trainer that breaks ties by hash order gives several vocabularies.
    vocabularies = set()
    for turn in range(6):
        texts = [*TEXTS[turn % 5 :], *TEXTS[: turn % 5], ""]
        trained = Tokenizer.train(iter(texts), vocab_size=140)
        vocabularies.add(tuple(trained.tokens(range(trained.vocab_size))))
    assert len(vocabularies) == 1


def test_training_refuses_what_cannot_work():
    with pytest.raises(DataError, match="needs texts"):
        Tokenizer.train(["", "  \n"])
    with pytest.raises(DataError, match="too small"):
        Tokenizer.train(TEXTS, vocab_size=50)


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    loaded.save(tmp_path / "again.json")
    assert path.read_bytes() == (tmp_path / "again.json").read_bytes()


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe\x00binary"])
def test_wrong_files_are_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(path)
    with pytest.raises(DataError, match=r"vocab\.txt"):
        Tokenizer.from_bert_vocab(path)


def test_missing_files_and_foreign_tokenizers_are_refused(tmp_path):
    import tokenizers

    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.from_bert_vocab(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "bpe.json"))
    with pytest.raises(DataError, match="not a WordPiece"):
        Tokenizer.load(tmp_path / "bpe.json")
    tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "bare.json"))
    with pytest.raises(DataError, match=r"lacks \[PAD\]"):
        Tokenizer.load(tmp_path / "bare.json")


@pytest.mark.parametrize("bad", ["", "   ", "\n", "\u200b\u0000"])
def test_empty_texts_are_refused(tokenizer, bad):
    with pytest.raises(DataError, match="text 1 is empty"):
        tokenizer.encode_batch(["a house", bad])
    with pytest.raises(DataError, match="is empty"):
        tokenizer.encode(bad)


def test_what_is_no_text_is_refused(tokenizer):
    with pytest.raises(DataError, match="NoneType"):
        tokenizer.encode(None)
    with pytest.raises(DataError, match="list of texts"):
        tokenizer.encode_batch("a house")


def test_a_batch_is_padded_to_its_own_longest_text(tokenizer):
    short, long = tokenizer.encode(TEXTS[0]), tokenizer.encode(TEXTS[1])
    ids, mask = tokenizer.encode_batch(TEXTS[:2])
    assert ids.dtype == torch.long and mask.dtype == torch.bool
    assert ids.shape == mask.shape == (2, max(len(short), len(long)))
    assert ids[0][mask[0]].tolist() == short and ids[1][mask[1]].tolist() == long
    assert (ids[~mask] == tokenizer.pad_id).all()
    assert tokenizer.encode_batch(TEXTS[:1])[0].shape == (1, len(short))


def test_max_length_cuts_but_keeps_the_end_token(tokenizer):
    ids, mask = tokenizer.encode_batch([TEXTS[1], "a"], max_length=5)
    assert ids.shape == (2, 5)
    assert ids[0].tolist() == [*tokenizer.encode(TEXTS[1])[:4], tokenizer.sep_id]
    assert mask[1].tolist() == [True] * 3 + [False] * 2
    with pytest.raises(DataError, match="3 or more"):
        tokenizer.encode_batch(TEXTS, max_length=2)


def test_pad():
    ids, mask = pad([[5, 6], [7]], 9)
    assert ids.tolist() == [[5, 6], [7, 9]] and mask.tolist() == [[True, True], [True, False]]
    with pytest.raises(DataError, match="nothing to pad"):
        pad([], 0)


def test_word_groups(bert_vocab):
    tokenizer = Tokenizer.from_bert_vocab(bert_vocab)
    ids, _ = tokenizer.encode_batch(["a unbelievable cats, cats", "a"])
    assert tokenizer.tokens(ids[0])[1:5] == ["a", "un", "##believ", "##able"]
    assert tokenizer.word_groups(ids).tolist() == [
        [-1, 0, 1, 1, 1, 2, 2, 3, 4, 4, -1],
        [-1, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1],
    ]
    # A piece whose beginning was cut off or masked does not join the word before it.
    cls, mask, sep = tokenizer.cls_id, tokenizer.mask_id, tokenizer.sep_id
    a, s = BERT_WORDS.index("a"), BERT_WORDS.index("##s")
    assert tokenizer.word_groups(torch.tensor([[cls, s, a, mask, s, s, sep]])).tolist() == [[-1, 0, 1, -1, 2, 2, -1]]


def test_word_groups_agree_with_the_library_on_real_captions(tokenizer):
    for text in TEXTS:
        expected = [-1 if word is None else word for word in tokenizer._tokenizer.encode(text).word_ids]
        assert tokenizer.word_groups([tokenizer.encode(text)])[0].tolist() == expected


def test_bert_vocabulary_agrees_with_transformers(bert_vocab):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.BertTokenizer.from_pretrained(str(bert_vocab.parent))
    tokenizer = Tokenizer.from_bert_vocab(bert_vocab)
    texts = [
        "A  Café: unbelievable cats, don't 猫 cat-cats [MASK]",
        "unbelievable\tCATS\n",
        "[CLS] a [SEP]",
        "a" * 101,
        "uncat cat's",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == oracle(text)["input_ids"]
        assert tokenizer.tokens(ids) == oracle.convert_ids_to_tokens(ids)
        assert tokenizer.decode(ids).split() == oracle.decode(ids, skip_special_tokens=True).split()


def test_bert_vocabulary_keeps_its_ids_and_adds_blips_tokens_at_the_end(bert_vocab):
    tokenizer = Tokenizer.from_bert_vocab(bert_vocab)
    assert tokenizer.tokens(range(len(BERT_WORDS))) == BERT_WORDS
    assert (tokenizer.dec_id, tokenizer.enc_id) == (len(BERT_WORDS), len(BERT_WORDS) + 1)  # as 30522 and 30523

    bert_vocab.write_text("\n".join([*BERT_WORDS, "[ENC]", "[DEC]"]), encoding="utf-8")
    present = Tokenizer.from_bert_vocab(bert_vocab)
    assert (present.enc_id, present.dec_id) == (len(BERT_WORDS), len(BERT_WORDS) + 1)
    assert present.vocab_size == tokenizer.vocab_size


def test_bert_vocabulary_with_a_line_twice_is_refused(bert_vocab):
    bert_vocab.write_text("\n".join([*BERT_WORDS, "cat"]), encoding="utf-8")
    with pytest.raises(DataError, match="not a BERT vocabulary"):
        Tokenizer.from_bert_vocab(bert_vocab)


def test_token_table_gives_what_encode_batch_gives(tokenizer):
    captions = [TEXTS[:2], TEXTS[2:3], TEXTS[2:5]]
    table = TokenTable(captions, tokenizer)
    assert len(table) == 3
    pictures = torch.tensor([2, 0, 0])
    for got, expected in (
        (table(pictures), [TEXTS[4], TEXTS[1], TEXTS[1]]),  # the last caption of each
        (table(pictures, 0), [TEXTS[2], TEXTS[0], TEXTS[0]]),
        (table(pictures, torch.tensor([4, 0, 3])), [TEXTS[3], TEXTS[0], TEXTS[1]]),  # modulo 3, 2, 2
    ):
        ids, mask = tokenizer.encode_batch(expected)
        assert torch.equal(got[0], ids) and torch.equal(got[1], mask)
    ids, mask = table.to("cpu")(torch.tensor([1]))
    assert ids[0].tolist() == tokenizer.encode(TEXTS[2]) and mask.all()  # cut to the longest of this batch


def test_token_table_takes_plain_texts_and_refuses_gaps(tokenizer):
    assert TokenTable(TEXTS, tokenizer)(torch.tensor([3]))[0][0].tolist() == tokenizer.encode(TEXTS[3])
    with pytest.raises(DataError, match="at least one caption"):
        TokenTable([["a house"], []], tokenizer)


# ---- hiding words ----

IGNORE = -100


@pytest.fixture
def sentences(bert_vocab) -> tuple[Tokenizer, torch.Tensor]:
    """Ids (4000, 11), half the rows padded: `un ##believ ##able` and `cat ##s` are words of several pieces."""
    tokenizer = Tokenizer.from_bert_vocab(bert_vocab)
    return tokenizer, tokenizer.encode_batch(["a unbelievable cats, cats", "unbelievable cafe cats"] * 2000)[0]


def masked(sentences, seed: int = 0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer, ids = sentences
    return mask_words(ids, tokenizer, generator=torch.Generator().manual_seed(seed), **options)


def words_and_hidden(sentences, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many pieces each word has, and how many of them are asked for: (4000, 5) twice, one column per word."""
    tokenizer, ids = sentences
    groups = torch.nn.functional.one_hot(tokenizer.word_groups(ids) + 1)[..., 1:]  # (B, L, words)
    return groups.sum(1), (groups * (labels != IGNORE)[..., None]).sum(1)


def test_labels_are_the_hidden_ids_and_the_rest_stays(sentences):
    _, ids = sentences
    before = ids.clone()
    corrupted, labels = masked(sentences)
    assert corrupted.shape == labels.shape == ids.shape and corrupted.dtype == labels.dtype == torch.long
    asked = labels != IGNORE
    assert torch.equal(labels[asked], ids[asked]) and torch.equal(corrupted[~asked], ids[~asked])
    assert torch.equal(ids, before)  # the input is left alone


def test_whole_words_are_hidden_whole(sentences):
    for whole_word, share in ((True, 0.15), (True, 0.5), (False, 0.15), (False, 0.5)):
        _, labels = masked(sentences, share=share, whole_word=whole_word)
        pieces, hidden = words_and_hidden(sentences, labels)
        split = ((hidden > 0) & (hidden < pieces)).sum().item()
        if whole_word:
            assert split == 0
        else:  # a piece next to its visible neighbours is easy to guess: this is what whole words are hidden for
            assert split > 1000


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
def test_share_of_hidden_words(sentences, share):
    pieces, hidden = words_and_hidden(sentences, masked(sentences, share=share)[1])
    exists = pieces > 0
    chosen = (hidden > 0) & exists
    assert chosen[exists].float().mean().item() == pytest.approx(share, abs=0.01)
    for word in range(5):  # long words no more often than short ones, early ones no more often than late ones
        assert chosen[exists[:, word], word].float().mean().item() == pytest.approx(share, abs=0.03)
    for one, other in itertools.combinations(range(5), 2):
        rows = exists[:, one] & exists[:, other]
        both = (chosen[rows, one] & chosen[rows, other]).float().mean().item()
        assert both == pytest.approx(share**2, abs=0.04)  # each word by itself
    tokens = masked(sentences, share=share, whole_word=False)[1] != IGNORE
    ordinary = sentences[0].word_groups(sentences[1]) >= 0
    assert tokens[ordinary].float().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("whole_word", [True, False])
def test_of_the_hidden_tokens_most_become_mask(sentences, whole_word):
    tokenizer, ids = sentences
    corrupted, labels = masked(sentences, share=0.5, whole_word=whole_word)
    asked = labels != IGNORE
    got, original = corrupted[asked], ids[asked]
    ordinary = tokenizer.vocab_size - len(tokenizer.special_ids)
    assert (got == tokenizer.mask_id).float().mean().item() == pytest.approx(0.8, abs=0.01)
    # A random token is now and then the original one.
    other = (got != tokenizer.mask_id) & (got != original)
    assert other.float().mean().item() == pytest.approx(0.1 * (1 - 1 / ordinary), abs=0.01)
    assert (got == original).float().mean().item() == pytest.approx(0.1 * (1 + 1 / ordinary), abs=0.01)
    counts = torch.bincount(got[other], minlength=tokenizer.vocab_size)
    assert not counts[list(tokenizer.special_ids)].any()
    seen = counts[counts > 0].float()
    assert len(seen) == ordinary and seen.min() > 0.5 * seen.mean()  # any of the others


@pytest.mark.parametrize("whole_word", [True, False])
def test_special_tokens_and_padding_are_never_hidden(sentences, whole_word):
    tokenizer, ids = sentences
    ids = ids.clone()
    ids[:, 2] = tokenizer.mask_id  # as if masked before
    ids[:, 3] = tokenizer.unk_id
    corrupted, labels = masked((tokenizer, ids), share=1.0, whole_word=whole_word)
    special = torch.isin(ids, torch.tensor(tokenizer.special_ids))
    assert (labels[special] == IGNORE).all() and torch.equal(corrupted[special], ids[special])
    assert torch.equal(labels[~special], ids[~special])  # and everything else is, at share 1
    assert (ids == tokenizer.pad_id).any()


def test_the_generator_decides_alone(sentences):
    state = torch.get_rng_state()
    first = masked(sentences, seed=3)
    torch.rand(7)
    again, other = masked(sentences, seed=3), masked(sentences, seed=4)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    torch.set_rng_state(state)
    masked(sentences)
    assert torch.equal(torch.get_rng_state(), state)
    tokenizer, ids = sentences
    generator = torch.Generator().manual_seed(3)
    rounds = [mask_words(ids, tokenizer, generator=generator)[1] for _ in range(2)]
    assert torch.equal(rounds[0], first[1]) and not torch.equal(rounds[0], rounds[1])  # new words in every epoch


def test_stored_tokenizer_fits_the_picture_book_as_well_as_a_fresh_one(monkeypatch, tmp_path):
    """If this fails after a change of the captions: delete data/tokenizer.json, python -m minivlp.data.preview

    They need not be equal: models depend on the stored ids, so a reworded caption alone is no reason to exchange them.
    """
    stored = Tokenizer.load(text_module.DEFAULT_FILE)
    monkeypatch.setattr(text_module, "DEFAULT_FILE", tmp_path / "absent.json")
    learnt = Tokenizer.default()
    assert stored.vocab_size == learnt.vocab_size == text_module.DEFAULT_VOCAB_SIZE
    texts = picturebook_texts(500)
    tokens = [one.encode_batch(texts)[1].sum().item() for one in (stored, learnt)]
    assert tokens[0] < 1.06 * tokens[1]
    poor = Tokenizer.train(TEXTS).encode_batch(texts)[1].sum().item()
    assert poor > 1.5 * tokens[1]  # a tokenizer of other texts would be noticed


def test_default_tokenizer_splits_some_content_words_and_knows_all():
    from minivlp.data.picturebook.world import COLOURS, KINDS, PLACES

    tokenizer = Tokenizer.default()
    texts = picturebook_texts(200)
    ids, mask = tokenizer.encode_batch(texts)
    assert tokenizer.unk_id not in ids[mask]
    synonyms = ("home", "cottage", "automobile", "ship", "kitten", "puppy", "blossom", "parasol", "violet", "town")
    words = [*KINDS, *COLOURS, *PLACES, *synonyms]
    split = [word for word in words if len(tokenizer.encode(word)) > 3]
    assert 0.05 <= len(split) / len(words) <= 0.25, split
