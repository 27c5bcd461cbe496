"""Windows: full, of one document each, spread evenly, and how a text that cannot give them is refused."""

import numpy as np
import pytest
import torch
from tiny_models import random_model, tiny

from hf_sparse.calibrate.windows import IGNORED, _cuts, windows_of
from hf_sparse.documents import Document
from hf_sparse.evaluate.head import ChunkedHead

WORDS = [f"word{i} is {i * i} and" for i in range(400)]
TEXTS = [" ".join(WORDS[i * 40 : i * 40 + 20 + 15 * i]) for i in range(6)]


def encoder(vocabulary=400, positions=64):
    options = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return random_model(
        "BertForMaskedLM", {**options, "vocab_size": vocabulary, "max_position_embeddings": positions}
    )


@pytest.fixture
def masking(tiny_tokenizer):
    """The tokenizer with the special tokens of an encoder."""
    names = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<pad>"}
    before = {name: getattr(tiny_tokenizer, name) for name in names}
    for name, value in names.items():
        setattr(tiny_tokenizer, name, value)
    yield tiny_tokenizer
    for name, value in before.items():
        setattr(tiny_tokenizer, name, value)


def cut(model, tokenizer, texts=TEXTS, length=20, samples=5, seed=0):
    return windows_of(ChunkedHead(model, 64), tokenizer, texts, length=length, samples=samples, seed=seed)


def test_a_window_is_bos_and_consecutive_tokens_of_one_document(tiny_model, tiny_tokenizer):
    made = cut(tiny_model, tiny_tokenizer, samples=8)
    assert (made.length, len(made.entries)) == (20, 8)
    own = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    cuts = [ids[i : i + 20] for ids in own for i in range(0, len(ids) - 19, 20)]
    taken = []
    for window in made.entries:
        assert window.ids.shape == window.targets.shape == (1, 20)
        assert window.ids[0, 0] == tiny_tokenizer.bos_token_id
        assert torch.equal(window.ids[0, 1:], window.targets[0, :-1])
        taken.append(cuts.index(window.targets[0].tolist()))
    assert len(set(taken)) == 8


def test_without_a_bos_token_a_window_begins_with_text(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(type(tiny_tokenizer), "bos_token_id", None, raising=False)
    made = cut(tiny_model, tiny_tokenizer, TEXTS[:1], length=20, samples=1)
    ids = tiny_tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert made.entries[0].ids[0].tolist() == ids[:20] and made.entries[0].targets[0].tolist() == ids[1:21]


@pytest.mark.parametrize(
    ("per_document", "samples", "expected"),
    [
        ([3, 1, 2], 3, [(0, 0), (1, 0), (2, 0)]),
        ([3, 1, 2], 5, [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]),
        ([3, 1, 2], 6, [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]),
        ([1] * 9, 3, [(0, 0), (3, 0), (6, 0)]),
        ([0, 0, 4, 0], 2, [(2, 0), (2, 1)]),
        ([1, 1], 9, [(0, 0), (1, 0)]),
        ([], 1, []),
    ],
)
def test_windows_are_spread_over_the_documents(per_document, samples, expected):
    assert _cuts(per_document, samples) == expected


def test_of_a_masked_window_the_share_is_masked_and_predicted(masking):
    made = cut(encoder(), masking, length=42, samples=4)
    for window in made.entries:
        ids, targets = window.ids[0], window.targets[0]
        assert ids[0] == masking.cls_token_id and ids[-1] == masking.sep_token_id
        hidden = targets != IGNORED
        assert hidden.sum() == 6 and not hidden[0] and not hidden[-1]
        assert torch.equal(hidden, ids == masking.mask_token_id)
        whole = torch.where(hidden, targets, ids)[1:-1].tolist()
        assert any(whole == own[i : i + 40] for own in tokens_of(masking) for i in range(0, len(own), 40))
    other = cut(encoder(), masking, length=42, samples=4, seed=1)
    assert made.fingerprint != other.fingerprint
    assert made.fingerprint == cut(encoder(), masking, length=42, samples=4).fingerprint


def tokens_of(tokenizer):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def test_generators_documents_and_strings_are_the_same_texts(tiny_model, tiny_tokenizer):
    forms = [TEXTS, (text for text in TEXTS), [Document(str(i), text) for i, text in enumerate(TEXTS)]]
    assert len({cut(tiny_model, tiny_tokenizer, form).fingerprint for form in forms}) == 1
    assert (
        cut(tiny_model, tiny_tokenizer, TEXTS[1:]).fingerprint != cut(tiny_model, tiny_tokenizer).fingerprint
    )


def test_the_default_length_is_what_the_model_was_trained_for(tiny_model, tiny_tokenizer):
    made = cut(tiny_model, tiny_tokenizer, [" ".join(WORDS)], length=None, samples=2)
    assert made.length == 512


def test_texts_that_are_too_short_say_how_much_is_missing(tiny_model, tiny_tokenizer):
    lengths = [len(ids) for ids in tokens_of(tiny_tokenizer)]
    held = sum(length // 100 for length in lengths)
    message = (
        rf"hold {held} windows of length=100 tokens, and samples=50 are asked for \(the longest of 6 texts has "
        rf"{max(lengths)} tokens\); give {100 * (50 - held)} more tokens, in texts of 100 or more, or use a shorter "
        "length or fewer samples"
    )
    with pytest.raises(ValueError, match=message):
        cut(tiny_model, tiny_tokenizer, length=100, samples=50)
    with pytest.raises(ValueError, match=r"hold 0 windows of length=400 tokens, .* give 2000 more tokens"):
        cut(tiny_model, tiny_tokenizer, ["two words"], length=400)
    with pytest.raises(ValueError, match="there are no documents to evaluate"):
        cut(tiny_model, tiny_tokenizer, [])
    with pytest.raises(ValueError, match="got a single one; put it into a list"):
        cut(tiny_model, tiny_tokenizer, "one text")


@pytest.mark.parametrize("length", [0, 1, 3, True, 20.0, "20"])
def test_lengths_that_hold_nothing_are_refused(length, tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"length must be a whole number >= 4 \(tokens of a window\), got"):
        cut(tiny_model, tiny_tokenizer, length=length)
    assert cut(tiny_model, tiny_tokenizer, length=4).length == 4


def test_learned_positions_are_not_exceeded(tiny_tokenizer, masking):
    with pytest.raises(ValueError, match="length=4096 is beyond the 128 positions of GPT2LMHeadModel"):
        cut(tiny("gpt2"), tiny_tokenizer, length=4096)
    with pytest.raises(ValueError, match="length=65 is beyond the 64 positions of BertForMaskedLM"):
        cut(encoder(), masking, length=65)


def test_the_tokenizer_is_the_models(tiny_tokenizer, masking):
    with pytest.raises(ValueError, match="knows only 0 to 63; use the tokenizer that belongs to the model"):
        cut(tiny("llama"), tiny_tokenizer)
    with pytest.raises(ValueError, match="use the tokenizer that belongs to the model"):
        cut(encoder(vocabulary=100), masking)


def test_an_encoder_needs_a_mask_token(tiny_tokenizer):
    with pytest.raises(ValueError, match="no mask token, which an encoder is calibrated with; set one"):
        cut(encoder(), tiny_tokenizer)


def test_fingerprints_tell_targets_apart(masking):
    made = cut(encoder(), masking, length=42, samples=2)
    changed = made.entries[0].targets.numpy()
    changed[changed != IGNORED] += np.int64(1)
    assert made.fingerprint != cut(encoder(), masking, length=42, samples=2).fingerprint
