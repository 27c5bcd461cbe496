"""Masked words: which, how many, and the same ones again when a run goes on."""

import numpy as np
import pytest
import torch
from numbers_tokenizer import ENCODER, written
from tiny_models import tiny
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, TrainingArguments

from hf_sparse import patch_model
from hf_sparse.train.data import IGNORED, MaskedWords, MaskEpochs, make_samples


def encoder_samples(seed=0, share=0.15, sizes=(15,) * 12, length=18):
    return make_samples(ENCODER, written(sizes), length, masked=MaskedWords(share, seed))


def test_a_share_of_the_words_is_predicted_and_never_a_special_token():
    samples = encoder_samples(share=0.3, sizes=(20, 33, 47), length=60)
    for number, row in enumerate(samples):
        ids = samples.ids[samples.piece_starts[samples.row_starts[number]] :][: len(row["labels"])]
        chosen = row["labels"] != IGNORED
        assert chosen.sum() == round(0.3 * (ids >= 8).sum())
        assert (ids[chosen] >= 8).all() and (row["labels"][chosen] == ids[chosen]).all()
        assert (row["input_ids"][~chosen] == ids[~chosen]).all()


def test_of_the_chosen_80_percent_are_masked_10_swapped_for_a_word_and_10_stay():
    samples = encoder_samples(share=1.0, sizes=(4000,), length=4003)
    fed, labels = samples[0]["input_ids"][1:-2], samples[0]["labels"][1:-2]
    others = fed[(fed != 3) & (fed != labels)]
    # a swapped word is the word itself in 1 of 56 cases; five standard errors of a share of 4000 are 0.03
    assert abs((fed == 3).mean() - 0.8) < 0.032 and abs(len(others) / 4000 - 0.1 * 55 / 56) < 0.024
    assert set(others) == set(range(8, 64))


def test_a_short_row_predicts_one_word_and_a_row_of_special_tokens_none():
    (row,) = encoder_samples(sizes=(2,))
    assert (row["labels"] != IGNORED).sum() == 1
    samples = make_samples(ENCODER, written([2, 2]), 18, masked=MaskedWords(), short="pad")
    fed, labels = samples.masking.mask(np.array([4, 7, 5, 6]), 0)
    assert fed.tolist() == [4, 7, 5, 6] and set(labels) == {IGNORED}


def test_seed_epoch_and_row_decide_the_masks():
    def drawn(seed, epoch):
        samples = encoder_samples(seed)
        samples.set_epoch(epoch)
        return [row["labels"].tolist() for row in samples]

    assert drawn(0, 0) == drawn(0, 0)
    first = [np.array(labels) != IGNORED for labels in drawn(0, 0)]
    assert len({tuple(chosen) for chosen in first}) > len(first) // 2, (
        "rows of a length differ in their masks"
    )
    for other in (drawn(1, 0), drawn(0, 1)):
        assert all(a != b for a, b in zip(drawn(0, 0), other, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_that_outlive_an_epoch_learn_of_the_next():
    samples = encoder_samples()
    loader = DataLoader(samples, collate_fn=samples.collate, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        samples.set_epoch(epoch)
        rows = [batch["labels"][0].tolist() for batch in loader]
        assert rows == [row["labels"].tolist() for row in samples]


class Recording(Trainer):
    """Keeps what the model is fed."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("fed", []).append((inputs["input_ids"].clone(), inputs["labels"].clone()))
        return super().compute_loss(model, inputs, *args, **kwargs)


def recorded(folder, resume=None):
    torch.manual_seed(0)
    samples = encoder_samples()
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=3,
        save_steps=5,
        save_strategy="steps",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = Recording(
        model=patch_model(tiny("bert"), "sliding_window", window=4),
        args=arguments,
        train_dataset=samples,
        data_collator=samples.collate,
        callbacks=[MaskEpochs()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return samples, trainer.fed


def test_a_trainer_masks_anew_in_each_epoch_and_goes_on_with_the_same_masks(tmp_path):
    samples, fed = recorded(tmp_path / "run")
    assert (
        len(samples) == 12 and len(fed) == 8
    )  # 4 steps in each epoch; the checkpoint is 1 step into the second
    for epoch, batches in enumerate((fed[:4], fed[4:])):
        samples.set_epoch(epoch)
        expected = sorted((row["input_ids"].tolist(), row["labels"].tolist()) for row in samples)
        seen = [(i.tolist(), x.tolist()) for ids, labels in batches for i, x in zip(ids, labels, strict=True)]
        assert sorted(seen) == expected
    _, resumed = recorded(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-5"))
    assert len(resumed) == 3
    for (ids, labels), (own_ids, own_labels) in zip(fed[5:], resumed, strict=True):
        assert torch.equal(ids, own_ids) and torch.equal(labels, own_labels)


def test_the_epoch_that_begins_reaches_the_dataset_whatever_the_dataloader_does():
    samples = encoder_samples()
    for epoch in (None, 0, 1.0, 1.5):
        loader = DataLoader(samples)
        MaskEpochs().on_epoch_begin(None, TrainerState(epoch=epoch), None, train_dataloader=loader)
        assert int(samples.masking.epoch) == int(epoch or 0)
