import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse
from hf_sparse import Full, PerHead, PerLayer, SlidingWindow, StreamingLLM, Strided
from hf_sparse.hf import settings
from hf_sparse.train.config.schedule import ScheduleArguments
from hf_sparse.train.schedule import Narrowing


def narrowing(pattern, first, *, share=0.5, length=512, **patching):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
        )
    )
    hf_sparse.patch_model(model, pattern, **patching)
    return Narrowing.of(model, settings(model), first, share, length)


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (SlidingWindow(64), (512, 256, 128)),
        (SlidingWindow(100), (512, 256, 128)),
        (StreamingLLM(sinks=4, window=60), (512, 256, 128, 64)),
        (Strided(64), (512, 256, 128, 64, 32, 16, 8, 4, 2)),
        (PerHead((Full(), Full(), SlidingWindow(200), SlidingWindow(50))), (512, 256, 128, 64)),
        (PerLayer((Full(), SlidingWindow(300))), (512,)),
    ],
    ids=str,
)
def test_windows_halve_until_one_adds_nothing(pattern, windows):
    assert narrowing(pattern, 512).windows == windows


def test_a_window_wider_than_the_samples_is_as_wide_as_they_are():
    assert narrowing(SlidingWindow(64), 4096, length=300).windows == (300, 150, 75)


def test_dense_layers_do_not_count():
    assert narrowing(SlidingWindow(64), 256, layers=[1]).windows == (256, 128)


def test_every_window_gets_as_many_steps_and_then_the_pattern_is_alone():
    found = narrowing(SlidingWindow(64), 512, share=0.6)
    windows = [found.window_at(step, 10) for step in range(10)]
    assert windows == [512, 512, 256, 256, 128, 128, None, None, None, None]
    assert [narrowing(SlidingWindow(64), None).window_at(step, 10) for step in (0, 5)] == [None, None]
    few = narrowing(Strided(64), 512, share=1.0)
    assert [few.window_at(step, 3) for step in range(3)] == [512, 64, 8]


@pytest.mark.parametrize(
    ("pattern", "first", "message"),
    [
        (SlidingWindow(64), 64, r"narrow_from=64 adds nothing to sliding_window\(window=64\) .* 512 tokens"),
        (Full(), 64, "narrow_from=64 adds nothing to full"),
        (hf_sparse.ReRoPE(window=16), 64, "sees keys at their own distances"),
    ],
)
def test_a_schedule_that_does_nothing_or_cannot_be_is_refused(pattern, first, message):
    with pytest.raises(ValueError, match=message):
        narrowing(pattern, first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"narrow_from": 1}, "narrow_from must be a whole number >= 2, got 1"),
        ({"narrow_share": 0.0}, "narrow_share must be above 0 and at most 1, got 0.0"),
        ({"narrow_share": 1.5}, "narrow_share must be above 0 and at most 1, got 1.5"),
    ],
)
def test_impossible_schedules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ScheduleArguments(**changes)
