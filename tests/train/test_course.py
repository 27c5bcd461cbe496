"""What two runs must share for one to go on from the other's checkpoints."""

import pytest

from hf_sparse.train.course import trained_with


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"max_steps": 9}, True),
        ({"logging_steps": 7}, True),
        ({"learning_rate": 2e-2}, False),
        ({"neftune_noise_alpha": 5.0}, False),
        ({"train_sampling_strategy": "sequential"}, False),
        ({"dataloader_drop_last": True}, False),
    ],
    ids=str,
)
def test_what_decides_the_weights_is_compared(arguments, training, changes, same):
    constant = {"lr_scheduler_type": "constant"}
    before = trained_with(arguments(), training(**constant), [])
    assert (trained_with(arguments(), training(**constant, **changes), []) == before) == same


def test_how_long_a_training_is_counts_where_the_window_narrows_with_it(arguments, training):
    wanted = arguments(narrow_from=64)
    three, nine = (
        trained_with(wanted, training(lr_scheduler_type="constant", max_steps=steps), []) for steps in (3, 9)
    )
    assert three != nine
