"""Packed and padded batches give each piece the logits and the gradients it gets alone."""

import numpy as np
import pytest
import torch
from numbers_tokenizer import ENCODER, Numbers, written
from tiny_models import tiny
from torch.nn.functional import cross_entropy

from hf_sparse import Longformer, PerHead, SlidingWindow, StreamingLLM, Strided, get_pattern, patch_model
from hf_sparse.train.data import IGNORED, MaskedWords, first_position, make_samples

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = (50, 7, 3, 11, 30, 2, 9)
CAUSAL = ("llama", "gpt2")
PATTERNS = [
    SlidingWindow(window=4),
    Longformer(window=3, global_tokens=(0,)),
    PerHead((SlidingWindow(2), StreamingLLM(1, 3), Strided(4), Longformer(window=2))),
    get_pattern("full"),
]


def samples_for(name, model, short):
    causal = name in CAUSAL
    return make_samples(
        Numbers(pad_token_id=1 if short == "pad" else None) if causal else ENCODER,
        written(SIZES),
        24,
        short=short,
        masked=None if causal else MaskedWords(0.3),
        position_start=first_position(model),
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model, samples, causal):
    """Return the logits of each piece in a forward of its own, and the gradients of the mean loss of all."""
    logits, losses, targets = [], [], 0
    for number, row in enumerate(samples):
        first, last = samples.row_starts[number : number + 2]
        sizes = np.diff(samples.piece_starts[first : last + 1]).tolist()
        pieces = torch.from_numpy(row["input_ids"]).split(sizes)
        masked = torch.from_numpy(row["labels"]).split(sizes)
        for piece, labels in zip(pieces, masked, strict=True):
            out = model(input_ids=piece[None]).logits[0]
            predicted, wanted = (out[:-1], piece[1:]) if causal else (out, labels)
            logits.append(out.detach())
            losses.append(cross_entropy(predicted, wanted, ignore_index=IGNORED, reduction="sum"))
            targets += int((wanted != IGNORED).sum())
    return torch.cat(logits), gradients(model, torch.stack(losses).sum() / targets)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", [*CAUSAL, "bert", "roberta"])
@pytest.mark.parametrize("short", ["pack", "pad"])
def test_a_batch_equals_its_pieces_alone(name, pattern, short):
    causal = name in CAUSAL
    model = patch_model(tiny(name), pattern)
    model.config.use_cache = False
    samples = samples_for(name, model, short)
    batch = samples.collate(list(samples))
    rows = [len(row["input_ids"]) for row in samples]
    assert min(rows) < max(rows), "something is filled or padded"
    assert batch.keys() == {"input_ids", "labels", "position_ids" if short == "pack" else "attention_mask"}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}

    labels = batch.pop("labels")
    logits = model(**batch).logits
    real = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    predicted, wanted = (logits[:, :-1], labels[:, 1:]) if causal else (logits, labels)
    loss = cross_entropy(predicted.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
    own_logits, own = alone(model, samples, causal)
    torch.testing.assert_close(logits[real], own_logits, **CLOSE)
    for parameter, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, own[parameter], **CLOSE, msg=lambda m, p=parameter: f"{p}: {m}")


def test_a_packed_row_is_filled_by_one_more_piece_and_a_full_one_by_nothing():
    samples = make_samples(Numbers(), written([6, 3, 11]), 12)
    full, packed = sorted(samples, key=lambda row: -len(row["input_ids"]))
    assert (len(full["input_ids"]), len(packed["input_ids"])) == (12, 11)
    batch = samples.collate([full, packed])
    assert batch["position_ids"].tolist() == [[*range(12)], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 0]]
    assert (batch["input_ids"][1, -1], batch["labels"][1, -1]) == (1, IGNORED)
    assert samples.collate([packed])["input_ids"].shape == (1, 11), (
        "rows are filled to the longest of their batch"
    )


def test_padded_rows_of_one_length_need_no_mask():
    samples = make_samples(Numbers(), written([6, 6]), 12, short="pad")
    assert samples.collate(list(samples)).keys() == {"input_ids", "labels"}
