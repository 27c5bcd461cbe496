import pytest
import torch
from transformers import AutoTokenizer

from hf_sparse.documents import Document, read_documents
from hf_sparse.train import make_samples
from hf_sparse.train.data import collate


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


def test_every_sample_is_bos_and_consecutive_tokens_of_one_document(tokenizer, text_files):
    documents = read_documents(text_files)
    samples = make_samples(tokenizer, documents, 64)["input_ids"]
    tokens = {d.name: tokenizer(d.text, add_special_tokens=False)["input_ids"] for d in documents}
    expected = [
        (tokenizer.bos_token_id, *ids[i : i + 63])
        for ids in tokens.values()
        for i in range(0, len(ids) - 62, 63)
    ]
    assert sorted(map(tuple, samples)) == sorted(expected)
    assert {len(sample) for sample in samples} == {64}
    assert len(expected) == sum(len(ids) // 63 for ids in tokens.values()) > 10


def test_same_seed_same_samples_and_another_seed_another_order(tokenizer, text_files):
    documents = read_documents(text_files)
    first, again, other = (make_samples(tokenizer, documents, 64, seed=s)["input_ids"] for s in (0, 0, 1))
    assert list(first) == list(again)
    assert list(first) != list(other)
    assert sorted(first) == sorted(other)


def test_limit_stops_the_reading(tokenizer, text_files):
    documents = read_documents(text_files)
    assert len(make_samples(tokenizer, documents, 64, limit=3)) == 3


def test_without_bos_the_eos_token_stands_first_and_without_both_nothing(base_folder, text_files):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    documents = read_documents(text_files)
    tokenizer.bos_token = None
    assert {row[0] for row in make_samples(tokenizer, documents, 64)["input_ids"]} == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    ids = tokenizer(documents[0].text, add_special_tokens=False)["input_ids"]
    assert next(iter(make_samples(tokenizer, documents[:1], 64)["input_ids"])) == ids[:64]


def test_too_short_texts_are_refused_with_the_longest_length(tokenizer):
    documents = [Document("a", "x = 1"), Document("b", "y")]
    with pytest.raises(
        ValueError, match=r"none of the 2 documents is long enough .* length=64 tokens \(the longest has"
    ):
        make_samples(tokenizer, documents, 64)


def test_collate_stacks_inputs_and_labels():
    batch = collate([{"input_ids": [0, 5, 6]}, {"input_ids": [0, 7, 8]}])
    assert torch.equal(batch["input_ids"], torch.tensor([[0, 5, 6], [0, 7, 8]]))
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
