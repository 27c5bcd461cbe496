"""How documents become pieces and rows, and what is refused."""

import itertools
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numbers_tokenizer import ENCODER, Numbers, written
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_sparse import get_pattern, patch_model
from hf_sparse.documents import Document, Skipped, read_documents
from hf_sparse.train import make_samples
from hf_sparse.train.data import MaskedWords, check_reach, first_position
from hf_sparse.train.data import packing as packing_module
from hf_sparse.train.data.packing import best_fit
from hf_sparse.train.data.pieces import Frame

SIZES = (50, 7, 3, 24, 11, 30, 2, 23)


def pieces_of(samples):
    starts = samples.piece_starts
    return [samples.ids[a:b].tolist() for a, b in itertools.pairwise(starts)]


def text_of(document):
    return [int(word) for word in document.text.split()]


@pytest.mark.parametrize("short", ["pack", "pad"])
@pytest.mark.parametrize("masked", [None, MaskedWords()])
@given(sizes=st.lists(st.integers(2, 70), min_size=1, max_size=12), length=st.integers(4, 40))
def test_every_token_is_in_exactly_one_piece(short, masked, sizes, length):
    tokenizer, before, after = (Numbers(), [2], []) if masked is None else (ENCODER, [4], [5, 6])
    documents, room = written(sizes), length - len(before) - len(after)
    samples = make_samples(tokenizer, documents, length, short=short, masked=masked)
    expected = [
        [*before, *ids[i : i + room], *after]
        for ids in map(text_of, documents)
        for i in range(0, len(ids), room)
    ]
    assert sorted(pieces_of(samples)) == sorted(expected)
    assert samples.longest == max(map(len, expected)) and samples.unused == 0
    assert (
        samples.tokens
        == sum(map(len, expected))
        == sum(len(samples[i]["input_ids"]) for i in range(len(samples)))
    )
    assert max(len(samples[i]["input_ids"]) for i in range(len(samples))) <= length
    assert len(samples) == len(expected) if short == "pad" else len(samples) <= len(expected)


@given(st.lists(st.integers(1, 30), max_size=60))
def test_packed_rows_hold_each_piece_once_and_no_two_of_them_would_fit_into_one(sizes):
    rows = best_fit(sizes, 30)
    assert sorted(piece for row in rows for piece in row) == list(range(len(sizes)))
    filled = sorted(sum(sizes[piece] for piece in row) for row in rows)
    assert not filled or filled[-1] <= 30
    assert len(filled) < 2 or filled[0] + filled[1] > 30


def test_the_best_fit_is_the_row_with_the_least_room():
    assert best_fit([3, 6, 2, 5, 4, 1], 10) == [[1, 4], [3, 0, 2], [5]]
    assert best_fit([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]


def test_pieces_are_packed_in_windows_of_bounded_size(monkeypatch):
    monkeypatch.setattr(packing_module, "WINDOW", 2)
    rows = list(packing_module.rows_of([np.zeros(n) for n in (4, 3, 10, 3, 3, 4)], 10, "pack"))
    assert [[len(piece) for piece in row] for row in rows] == [[4, 3], [10], [3, 3], [4]]


def test_rows_know_where_their_pieces_begin():
    samples = make_samples(Numbers(), written([4, 3]), 9, position_start=2)
    (row,) = samples
    assert row["position_ids"].tolist() == [2, 3, 4, 5, 6, 2, 3, 4, 5]
    assert row["input_ids"][[0, 5]].tolist() == [2, 2]
    assert row["labels"].tolist() == [-100, *row["input_ids"][1:5], -100, *row["input_ids"][6:]]
    assert samples[-1]["input_ids"].tolist() == row["input_ids"].tolist()
    with pytest.raises(IndexError):
        samples[1]


def test_drop_leaves_out_what_does_not_fill_a_sample_and_says_how_much():
    samples = make_samples(Numbers(), written(SIZES), 24, short="drop")
    assert len(samples) == 2 + 1 + 1 + 1 and {len(row["input_ids"]) for row in samples} == {24}
    assert samples.unused == sum(SIZES) - 5 * 23
    assert samples.collate([samples[0], samples[1]]).keys() == {"input_ids", "labels"}


def test_the_first_token_is_bos_else_eos_else_none():
    for tokenizer, before in (
        (Numbers(), (2,)),
        (Numbers(bos_token_id=None, eos_token_id=5), (5,)),
        (Numbers(bos_token_id=0, eos_token_id=5), (0,)),
        (Numbers(bos_token_id=None), ()),
    ):
        assert Frame.causal(tokenizer) == Frame(before)


def test_an_encoders_pieces_stand_between_the_tokenizers_own_special_tokens():
    words = {word: i for i, word in enumerate(["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", "a", "b"])}
    own = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    assert (
        Frame.encoder(PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]", **special)) == Frame()
    )
    own.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 0), ("[SEP]", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]", **special)
    assert Frame.encoder(tokenizer) == Frame((0,), (1,))
    samples = make_samples(tokenizer, [Document("x", "a b b a b")], 5, masked=MaskedWords())
    assert pieces_of(samples) == [[0, 5, 6, 6, 1], [0, 5, 6, 1]]


def test_a_tokenizer_that_makes_other_tokens_beside_special_ones_is_refused():
    class Odd(Numbers):
        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [4, 10, 5] if add_special_tokens else [9]}

    with pytest.raises(
        ValueError, match=r"special tokens of Odd cannot be told .* it makes \[9\] of 'a', and \[4, 10, 5\]"
    ):
        Frame.encoder(Odd())


def test_same_seed_same_rows_and_another_seed_another_order(base_folder, text_files):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    documents = read_documents(text_files)
    first, again, other = (make_samples(tokenizer, documents, 64, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.ids, again.ids)
    assert not np.array_equal(first.ids, other.ids)
    assert sorted(pieces_of(first)) == sorted(pieces_of(other))


@pytest.mark.parametrize(("short", "limit", "read"), [("pack", 4, 3), ("pad", 4, 2), ("drop", 3, 3)])
def test_limit_stops_the_reading_at_the_end_of_a_document(short, limit, read):
    asked = []

    class Counting(Numbers):
        def __call__(self, text, **options):
            asked.append(text)
            return super().__call__(text, **options)

    documents = written([15] * 9)  # pieces of 10 and of 7 tokens each
    samples = make_samples(Counting(), documents, 10, short=short, limit=limit)
    assert len(asked) == read
    assert samples.tokens == 17 * read - (7 * read if short == "drop" else 0)


def test_samples_survive_pickling_and_hold_four_bytes_per_token():
    samples = make_samples(ENCODER, written(SIZES), 24, masked=MaskedWords(seed=3))
    samples.set_epoch(2)
    copy = pickle.loads(pickle.dumps(samples))
    assert all(
        np.array_equal(samples[i][key], copy[i][key]) for i in range(len(samples)) for key in samples[i]
    )
    assert samples.ids.dtype == np.int32 and samples.ids.nbytes == 4 * samples.tokens


def test_short_documents_are_left_out_only_where_that_is_asked_for():
    documents = [Document("blank", " \n"), Document("one", "9"), *written([2, 9])]
    with pytest.raises(
        ValueError, match=r"blank holds no text; .* leave such documents out with skip_shorter_than=2"
    ):
        make_samples(Numbers(), documents, 8)
    with pytest.raises(ValueError, match=r"one has 1 tokens, fewer than the 2 .* with skip_shorter_than=2"):
        make_samples(Numbers(), documents[1:], 8)
    with pytest.raises(ValueError, match=r"one has 1 tokens"):
        make_samples(Numbers(), documents, 8, skip_shorter_than=1)
    samples = make_samples(Numbers(), documents, 8, skip_shorter_than=3)
    assert sorted(samples.skipped, key=lambda skipped: skipped.name) == [
        Skipped("blank", "has 0 of 3 tokens"),
        Skipped("d0", "has 2 of 3 tokens"),
        Skipped("one", "has 1 of 3 tokens"),
    ]
    assert samples.tokens == 9 + 2


@pytest.mark.parametrize(
    ("tokenizer", "sizes", "options", "message"),
    [
        (Numbers(), [5], {"short": "cut"}, "short must be one of pack, pad, drop, got 'cut'"),
        (
            Numbers(),
            [5],
            {"length": 1},
            "length=1 leaves no room for text beside 1 special tokens; give at least 2",
        ),
        (ENCODER, [5], {"length": 3, "masked": MaskedWords()}, "beside 3 special tokens; give at least 4"),
        (
            Numbers(pad_token_id=None),
            [5],
            {"short": "pad"},
            "no pad token, .* use short=pack, which needs none",
        ),
        (Numbers(mask_token_id=None), [5], {"masked": MaskedWords()}, "no mask token"),
        (Numbers(), [], {}, "there are no documents to train on"),
        (
            Numbers(),
            [5, 7],
            {"skip_shorter_than": 9},
            r"skip_shorter_than=9 leaves none of the 2 documents \(the longest has 7 tokens\)",
        ),
        (
            Numbers(),
            [5, 7],
            {"short": "drop"},
            r"none of the 2 documents is long enough .* length=16 tokens \(the longest has 7\); .* short=pack",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(tokenizer, sizes, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_samples(tokenizer, written(sizes), **{"length": 16, **options})
    assert "\n" not in str(caught.value)


def test_a_share_of_masked_words_lies_between_0_and_1():
    with pytest.raises(ValueError, match=re.escape("share must be above 0 and at most 1, got 0.0")):
        MaskedWords(0.0)


def test_texts_that_are_seen_whole_are_refused(base_folder):
    model = LlamaForCausalLM.from_pretrained(base_folder)
    samples = make_samples(Numbers(), written([15, 4]), 64)
    check_reach(samples, patch_model(model, "sliding_window", window=15))
    check_reach(samples, patch_model(model, "sliding_window", window=8, layers=[1]))
    for pattern in (get_pattern("sliding_window", window=16), get_pattern("full")):
        patch_model(model, pattern)
        with pytest.raises(
            ValueError, match=r"leaves nothing out of the longest piece of text, of 16 tokens, so"
        ):
            check_reach(samples, model)


def test_positions_begin_behind_the_paddings_in_roberta_alone():
    firsts = {name: first_position(tiny(name)) for name in ("llama", "gpt2", "opt", "bert", "roberta")}
    assert firsts == {"llama": 0, "gpt2": 0, "opt": 0, "bert": 0, "roberta": 2}
