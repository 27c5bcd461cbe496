"""Model cards: what they say is what was trained, and nothing of the machine or of a person's own card is lost."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import hf_sparse
from hf_sparse.train import prepare
from hf_sparse.train.card import MARKER, merged_card, model_card, write_card
from hf_sparse.train.provenance import hub_id, license_of, listed, shown

FIGURES = {
    "eval_base_dense_nats_per_token": 2.0,
    "eval_base_sparse_nats_per_token": 2.5,
    "eval_sparse_nats_per_token": 2.125,
    "eval_sparse_density": 0.2,
    "step": 3,
}


@pytest.fixture
def card_of(arguments, training):
    """Return a function that gives the card of an adapter as it is before its first step."""

    def make(figures=None, training_changes=(), scored=0, **changes):
        wanted, settings = arguments(**changes), training(**dict(training_changes))
        trainer = prepare(wanted, settings)
        samples = trainer.train_dataset
        return model_card(trainer.model, wanted, settings, samples, steps=3, figures=figures, scored=scored)

    return make


def test_a_card_says_what_was_trained_and_how_to_load_it(card_of, base_folder, tmp_path):
    card = card_of(
        training_changes={"gradient_accumulation_steps": 4, "learning_rate": 3e-4, "seed": 11},
        lora_targets=["q_proj", "down_proj"],
        lora_r=3,
        lm_weight=0.25,
        narrow_from=32,
    )
    text = card.content
    for said in (
        '"pattern": {"name": "sliding_window", "options": {"window": 8}}',
        "pattern   sliding_window(window=8)",
        "3 steps of 8 samples",
        "of up to 64 tokens, ",
        "`long.txt`, `short.txt`, `other.txt`",
        "LoRA on: `down_proj`, `q_proj`",
        "`input_layernorm`, `norm`, `post_attention_layernorm`",
        "lora_r=3",
        "kl_weight=1.0, lm_weight=0.25",
        "narrow_from=32",
        "learning rate 0.0003",
        "seed: 11",
        f"hf_sparse {hf_sparse.__version__}",
        "Nothing was measured. `hf-sparse eval FOLDER --length 64`",
        'hf_sparse.load("FOLDER")',
        "dense attention with this adapter is another model",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert said in text, said
    assert str(base_folder) not in text and str(tmp_path) not in text and "/tmp" not in text
    assert base_folder.name in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.base_model is None and data.license is None and data.eval_results is None
    assert {"lora", "sparse-attention", "sparse_sliding_window"} <= set(data.tags)


def test_the_same_training_gives_the_same_card_and_other_texts_another(card_of, text_files):
    first = card_of().content
    assert card_of().content == first
    lines = [line for line in first.splitlines() if "sha256" in line]
    assert len(lines) == 1 and lines[0] not in card_of(length=63).content


def test_figures_become_a_table_and_metadata(card_of):
    card = card_of(FIGURES, scored=5, eval_documents=8)
    assert "| base model, dense attention | 7.389 | 2.0000 | +0.0000 |" in card.text
    assert "| with this adapter, this pattern | 8.373 | 2.1250 | +0.1250 |" in card.text
    where = "of the validation split of the standard library"
    assert f"Of 5 held-out documents {where}" in card.text  # what there was, not what was asked for
    found = {result.metric_name: result.metric_value for result in ModelCard(card.content).data.eval_results}
    assert found["perplexity with this adapter, this pattern"] == 8.3729 and len(found) == 3
    only = card_of({"eval_sparse_nats_per_token": 2.125}, scored=1).text
    assert f"Of 1 held-out document {where}" in only
    assert (
        "| with this adapter, this pattern | 8.373 | 2.1250 |  |" in only and "base model, dense" not in only
    )


def test_a_control_says_that_it_is_one(card_of):
    text = card_of(dense_control=True).text
    assert "trained with dense attention as the control" in text and "to be run under it" not in text


def test_a_card_that_a_person_wrote_stays(card_of, tmp_path):
    card = card_of()
    assert write_card(tmp_path, card) and write_card(tmp_path, card)
    path = tmp_path / "README.md"
    assert path.read_text(encoding="utf-8") == card.content and MARKER in card.content
    path.write_text("# Mine")
    assert not write_card(tmp_path, card) and path.read_text() == "# Mine"
    path.write_bytes(b"\xff\xfe mine")
    assert not write_card(tmp_path, card) and path.read_bytes() == b"\xff\xfe mine"


def test_a_merged_models_card_tells_what_its_adapters_told(card_of, tmp_path, arguments, training):
    wanted = arguments()
    trainer = prepare(wanted, training())
    card = model_card(trainer.model, wanted, training(), trainer.train_dataset, steps=3, figures=FIGURES)
    write_card(tmp_path, card)
    sparse = hf_sparse.hf.settings(trainer.model)
    merged = merged_card(trainer.model.get_base_model(), sparse, str(tmp_path), "org/base")
    assert (merged.data.base_model, merged.data.base_model_relation) == ("org/base", "finetune")
    assert "3 steps of 2 samples" in merged.text and merged.text.count("## Training") == 1
    assert merged.text.count("- pattern: ") == 1 and "| base model, dense attention | 7.389" in merged.text
    assert merged.text.count("## How to load") == 1 and "PeftModel" not in merged.text
    assert 'attn_implementation="sparse_sliding_window"' in merged.text
    (tmp_path / "README.md").write_text("# Mine")
    assert "Training" not in merged_card(trainer.model.get_base_model(), sparse, str(tmp_path), "org/b").text


def test_names_as_others_may_read_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder/base").mkdir(parents=True)
    assert (shown("org/name"), shown("folder/base"), shown(str(tmp_path / "folder"))) == (
        "org/name",
        "folder/base",
        "folder",
    )
    assert (shown("../../customer/folder"), shown(".")) == ("folder", tmp_path.name)
    assert (hub_id("org/name"), hub_id("folder/base"), hub_id(str(tmp_path)), hub_id("")) == (
        "org/name",
        None,
        None,
        None,
    )
    assert listed(map(str, range(12))).endswith("`9` and 2 more")


def test_a_licence_comes_from_the_base_models_own_card(tmp_path):
    assert license_of(str(tmp_path)) == {} and license_of("org/name") == {}
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: other\nlicense_name: mine\ntags: [a]\n---\n# Base")
    assert license_of(str(tmp_path)) == {"license": "other", "license_name": "mine"}
    for other in ("---\nlicense: [unclosed\n---\n", "---\n- a list\n---\n", "# Base"):
        path.write_text(other)
        assert license_of(str(tmp_path)) == {}
