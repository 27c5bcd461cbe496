"""What cannot work is refused in one sentence, before a step is made."""

import shutil

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Lfm2Config,
    Lfm2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_sparse.train import adapt, prepare, run
from hf_sparse.train.model import load_patched

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 2,
}


def lfm2():
    """A convolution, then attention."""
    config = Lfm2Config(
        **SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"], block_multiple_of=8
    )
    model = Lfm2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model


def bart():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 128}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return BartForConditionalGeneration(BartConfig(vocab_size=4096, **sizes, **heads, **widths))


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    )


@pytest.fixture
def on(arguments, base_folder, tmp_path):
    """Arguments for another model beside the base's tokenizer."""

    def make(model, **changes):
        torch.manual_seed(0)
        wanted, folder = arguments(**changes), tmp_path / "model"
        if not folder.exists():
            shutil.copytree(base_folder, folder)
            model().save_pretrained(folder)
        wanted.model = str(folder)
        return wanted

    return make


def refusal(arguments, training):
    with pytest.raises(ValueError) as caught:
        prepare(arguments, training)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hybrid_whose_convolutions_join_packed_samples_is_trained_on_samples_of_their_own(
    on, training, dtype
):
    text = refusal(on(lfm2, dtype=dtype), training())
    assert "Lfm2ForCausalLM carries something from one sample of a packed row into the next" in text
    assert "set short=pad" in text
    assert refusal(on(lfm2, dense_control=True), training()) == text
    trainer = prepare(on(lfm2, short="pad"), training(max_steps=1))
    assert run(trainer).is_dir()


def test_samples_that_fill_their_rows_need_not_be_kept_apart(on, training, text_files):
    wanted = on(lfm2)
    wanted.text = text_files[:1]  # its last piece is alone in its row too
    assert len(prepare(wanted, training()).train_dataset) > 1


def test_an_encoder_decoder_is_named_as_such(on, training):
    assert "is an encoder-decoder (bart), which this objective does not train" in refusal(
        on(bart), training()
    )


def test_dora_on_experts_is_refused_with_a_cure(on, training):
    text = refusal(on(mixtral, lora_targets=["all-linear"], use_dora=True), training())
    assert text.startswith("peft cannot put this LoRA on MixtralForCausalLM (")
    assert text.endswith("leave use_dora out, or name other layers with lora_targets.")


def test_a_backend_that_has_no_backward_pass_here_is_refused(arguments, training, monkeypatch):
    wanted = arguments(backend="torch")
    assert prepare(wanted, training()) is not None

    def patched_for_flex(*args):  # its own trial, a forward pass, would compile kernels for minutes
        model, tokenizer = load_patched(*args)
        model.config.sparse_attention = {**model.config.sparse_attention, "backend": "flex"}
        return model, tokenizer

    monkeypatch.setattr(adapt, "load_patched", patched_for_flex)
    assert "backend='flex' cannot run this call: FlexAttention has no backward" in refusal(wanted, training())


def test_a_pattern_that_sees_all_but_at_other_distances_can_be_trained(arguments, training):
    wanted = arguments(pattern="rerope", pattern_options={"window": 8})
    assert prepare(wanted, training(max_steps=1)) is not None
    text = refusal(arguments(pattern="rerope", pattern_options={"window": 64}), training())
    assert "nothing to recover" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0 and max_steps=-1 train nothing"),
        ({"max_steps": 0, "num_train_epochs": -1}, "num_train_epochs=-1 and max_steps=0 train nothing"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 500},
            "dataloader_drop_last=True leaves out all [0-9]+ samples, fewer than the 500 of a batch",
        ),
    ],
)
def test_a_training_without_a_step_is_refused(arguments, training, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(arguments(), training(**changes))


def test_settings_may_be_used_for_a_second_training(arguments, training):
    settings = training(save_total_limit=2, max_steps=1)
    limits = [prepare(arguments(), settings).limit for _ in range(2)]
    assert limits == [2, 2] and settings.save_total_limit == 2


def test_a_share_of_masked_words_is_for_encoders(arguments, training):
    with pytest.raises(
        ValueError, match=r"mask_share=0\.3 is for encoders, and LlamaForCausalLM predicts every"
    ):
        prepare(arguments(mask_share=0.3), training())
