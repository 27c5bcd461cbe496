import json

import pytest

from hf_sparse import PerHead, SlidingWindow, StreamingLLM, Strided, get_pattern
from hf_sparse.hf import SparseSettings
from hf_sparse.patterns import pattern_to_json, registry
from hf_sparse.train import AdaptationArguments, ConfigParser, SparseTrainingArguments
from hf_sparse.train.config.objective import ObjectiveArguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "sliding_windw"}, "Did you mean 'sliding_window'"),
        ({"pattern_options": {"window": 0}}, "window must be >= 1"),
        ({"pattern_options": {"windw": 4}}, "no option 'windw'"),
        ({"pattern_options": "[1, 2]"}, r"must be a mapping.*got \[1, 2\]"),
        ({"pattern_options": "{window: "}, "must be a YAML or JSON mapping"),
        ({"pattern": "strided | longformer", "pattern_options": {"stride": 2}}, "one mapping per member"),
        ({"backend": "magic"}, "unknown backend 'magic'"),
        ({"length": 1}, "length must be a whole number >= 2, got 1"),
        ({"lora_r": 0}, "lora_r must be a whole number >= 1, got 0"),
        ({"lora_alpha": True}, "lora_alpha must be a whole number >= 1, got True"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"dtype": "int8"}, "dtype must be .* got 'int8'"),
        ({"text": []}, "text is an empty list"),
        ({"dense_control": True, "pattern": "no_such"}, "unknown pattern 'no_such'"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        AdaptationArguments(**settings)
    assert "\n" not in str(caught.value)


def test_pattern_options_may_be_written_as_yaml_or_json():
    for written in ("{window: 7}", '{"window": 7}', {"window": 7}):
        assert AdaptationArguments(pattern_options=written).chosen_pattern() == SlidingWindow(7)


def test_union_takes_the_options_of_each_member():
    arguments = AdaptationArguments(
        pattern="sliding_window | strided",
        pattern_options={"strided": {"stride": 5}, "sliding_window": {"window": 3}},
    )
    assert arguments.chosen_pattern() == SlidingWindow(3) | Strided(5)


def test_the_dense_control_is_the_full_pattern():
    assert AdaptationArguments(dense_control=True).chosen_pattern() == get_pattern("full")


PLUGIN = """
from dataclasses import dataclass
import hf_sparse

@hf_sparse.register_pattern("{name}")
@dataclass(frozen=True)
class Mine(hf_sparse.Pattern):
    reach: int = 4

    def allows(self, context, head, query, key):
        return query - key < self.reach
"""


def test_patterns_of_a_plugin_train_too(parser, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_PATTERNS", dict(registry._PATTERNS))
    for name in ("from_a_file", "another"):
        (tmp_path / f"{name}.py").write_text(PLUGIN.format(name=name), encoding="utf-8")
    with pytest.raises(ValueError, match="unknown pattern 'from_a_file'"):
        AdaptationArguments(pattern="from_a_file")
    text = f"pattern: from_a_file\npattern_options: {{reach: 9}}\nplugin: {tmp_path}/from_a_file.py\n"
    arguments, _ = parser.parse(["--config", write(tmp_path, text)])
    assert str(arguments.chosen_pattern()) == "from_a_file(reach=9)"
    assert arguments.as_json()["plugin"] == [f"{tmp_path}/from_a_file.py"]
    files = [f"{tmp_path}/{name}.py" for name in ("from_a_file", "another")]
    arguments, _ = parser.parse(["--plugin", *files, "--pattern", "another | strided"])
    assert "another(reach=4) | strided" in str(arguments.chosen_pattern())
    with pytest.raises(ValueError, match="there is no plugin file"):
        AdaptationArguments(plugin=str(tmp_path / "missing.py"))
    with pytest.raises(ValueError, match="plugin is an empty list"):
        AdaptationArguments(plugin=[])


@pytest.fixture
def parser():
    return ConfigParser((AdaptationArguments, SparseTrainingArguments))


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_command_line_wins_over_the_file_and_types_are_those_of_the_fields(parser, tmp_path):
    path = write(
        tmp_path,
        "pattern: strided\npattern_options: {stride: 4}\nlearning_rate: 1e-3\ntrain_norms: false\nlayers: [0, 2]\n"
        f"max_steps: 7\nwarmup_steps: 2\nresume_from_checkpoint: null\noutput_dir: {tmp_path}/a\n",
    )
    arguments, training = parser.parse(
        ["--config", path, "--max_steps", "9", "--pattern_options={stride: 6}"]
    )
    assert arguments.chosen_pattern() == Strided(6)
    assert (arguments.train_norms, arguments.layers, training.max_steps) == (False, [0, 2], 9)
    assert (training.learning_rate, training.resume_from_checkpoint) == (1e-3, None)
    assert training.remove_unused_columns is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windw: 3\n", r"unknown key 'windw' in .*c\.yaml"),
        ("max_step: 3\n", "Did you mean 'max_steps'"),
        ("- a\n- b\n", "must hold 'key: value' lines, got list"),
        ("a: [1\n", r"is not valid YAML \(line 2\)"),
        ("max_steps: many\n", "argument --max_steps.*invalid int value: 'many'"),
        ("train_norms: perhaps\n", "argument --train_norms"),
    ],
)
def test_mistakes_in_the_file_are_one_sentence(parser, tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parser.parse(["--config", write(tmp_path, text)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--windw", "3"], "unknown argument '--windw'"),
        (["--max_step=3"], "unknown argument '--max_step' on the command line. Did you mean 'max_steps'"),
        (["--config"], "--config needs the path"),
        (["--config=nowhere.yaml"], "cannot read the config file nowhere.yaml: No such file"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(parser, argv, message):
    with pytest.raises(ValueError, match=message):
        parser.parse(argv)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size must be a whole number >= 1, got 0",
        ),
        (
            {"gradient_accumulation_steps": 0},
            "gradient_accumulation_steps must be a whole number >= 1, got 0",
        ),
        ({"seed": -1}, "seed must be between 0 and 4294967295, got -1"),
        ({"seed": 2**70}, f"seed must be between 0 and 4294967295, got {2**70}"),
    ],
)
def test_impossible_training_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SparseTrainingArguments(output_dir=str(tmp_path), **settings)


def test_a_pattern_of_heads_or_layers_comes_from_a_json_file(tmp_path):
    file, pattern = tmp_path / "heads.json", PerHead((SlidingWindow(4), StreamingLLM(1, 3)))
    file.write_text(json.dumps(pattern_to_json(pattern)))
    assert AdaptationArguments(pattern=str(file)).chosen_pattern() == SparseSettings(pattern)
    with pytest.raises(ValueError, match="pattern_options go with a named pattern"):
        AdaptationArguments(pattern=str(file), pattern_options={"window": 3})
    with pytest.raises(
        ValueError, match=r"none\.json cannot be read \(No such file or directory\); check the path"
    ):
        AdaptationArguments(pattern=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight must be a number >= 0, got -1.0"),
        ({"kl_weight": 0.0}, "are all 0: nothing would be learnt"),
        ({"mask_share": 0.0}, "mask_share must be above 0 and at most 1, got 0.0"),
        ({"head_chunk": 0}, "head_chunk must be a whole number >= 1, got 0"),
    ],
)
def test_impossible_weights_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveArguments(**settings)
