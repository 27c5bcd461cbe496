"""What a training may be spread over: the configurations of recipes/accelerate, and what is refused before it runs."""

import argparse
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType

from hf_sparse.train import prepare
from hf_sparse.train.engine import check_engine, check_head, gathered, loaded_in_full

FOLDER = Path(__file__).resolve().parents[2] / "recipes/accelerate"
FILES = {
    "cpu": "NO",
    "single_gpu": "NO",
    "multi_gpu": "MULTI_GPU",
    "fsdp2": "FSDP",
    "deepspeed_zero3": "DEEPSPEED",
}
PREFIXES = ("FSDP_", "ACCELERATE_", "PARALLELISM_CONFIG_")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Begin without what accelerate launch leaves, and end with what was there before."""
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def launched(name, monkeypatch):
    """Set what ``accelerate launch --config_file NAME.yaml`` sets for a script, and return its arguments."""
    path = str(FOLDER / f"{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = (
            ""  # which names a file of DeepSpeed's own must not repeat
        )
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        if key.startswith(PREFIXES):
            monkeypatch.setenv(key, value)
    return arguments


def known_options():
    return {action.dest for action in launch_command_parser()._actions if action.dest != argparse.SUPPRESS}


def test_there_is_a_configuration_for_each_engine_and_no_other():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_configuration_and_knows_all_of_it(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys of the first level
    assert config.distributed_type == FILES[name]
    assert config.mixed_precision == "no"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section in ("fsdp_config", "deepspeed_config"):
        assert written.get(section, {}).keys() <= known_options()


def test_the_fsdp2_configuration_gives_the_plugin_that_checkpoints_and_patterns_need(monkeypatch, training):
    launched("fsdp2", monkeypatch)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
    check_engine(training())


def test_the_zero3_configuration_gives_the_plugin_that_checkpoints_need(monkeypatch, training):
    settings = training()  # which asks for DeepSpeed itself, where the launch does
    launched("deepspeed_zero3", monkeypatch)
    plugin = DeepSpeedPlugin()
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"
    assert not plugin.zero3_init_flag
    settings.deepspeed_plugin = plugin
    check_engine(settings)
    zero["stage3_gather_16bit_weights_on_model_save"] = False
    with pytest.raises(
        ValueError, match=r"ZeRO-3 without stage3_gather_16bit_weights_on_model_save cannot save"
    ):
        check_engine(settings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "label_smoothing_factor",
            0.1,
            r"label_smoothing_factor=0\.1 is not part of this objective; leave it out",
        ),
        ("use_liger_kernel", True, "use_liger_kernel=True puts another output head into the model"),
        ("torch_compile", True, "torch_compile=True follows one attention"),
        ("_n_gpu", 2, r"one process would share 2 GPUs \(DataParallel\).*start one process per GPU"),
        ("fp16", True, "fp16=True needs an accelerator; on a CPU use bf16=True"),
    ],
)
def test_settings_that_the_objective_cannot_follow_are_refused_first(
    arguments, training, name, value, message
):
    settings, wanted = training(), arguments()
    setattr(settings, name, value)
    wanted.model = "/nowhere"  # never read
    with pytest.raises(ValueError, match=message):
        prepare(wanted, settings)


@pytest.mark.parametrize("kind", ["cp", "sp", "tp"])
def test_spreading_tokens_or_layers_weights_is_refused_however_it_is_asked_for(training, monkeypatch, kind):
    settings = training()
    settings.parallelism_config = ParallelismConfig(**{f"{kind}_size": 2})
    with pytest.raises(ValueError, match=rf"{kind}_size=2: .*parallelism.*recipes/accelerate"):
        check_engine(settings)
    settings.parallelism_config = ParallelismConfig(dp_shard_size=2)
    check_engine(settings)
    settings.parallelism_config = None
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "4")
    check_engine(settings)  # nothing reads it
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(ValueError, match=rf"{kind}_size=4: "):
        check_engine(settings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "FSDP_VERSION",
            "1",
            "fsdp_version=1 puts what is trained and what is frozen into one tensor; set it to 2",
        ),
        (
            "FSDP_STATE_DICT_TYPE",
            "SHARDED_STATE_DICT",
            "fsdp_state_dict_type=SHARDED_STATE_DICT leaves no process",
        ),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "without weights to try the pattern on; set it to false"),
    ],
)
def test_ways_of_fsdp_without_a_whole_model_or_adapter_are_refused(
    training, monkeypatch, name, value, message
):
    launched("fsdp2", monkeypatch)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_engine(training())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    check_engine(training())


def test_fsdp_asked_for_by_the_arguments_is_checked_as_well(training):
    settings = training()
    settings.fsdp_plugin_args = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
    check_engine(settings)
    settings.fsdp_plugin_args["state_dict_type"] = "SHARDED_STATE_DICT"
    with pytest.raises(ValueError, match="fsdp_state_dict_type=SHARDED_STATE_DICT"):
        check_engine(settings)


def test_a_trained_head_is_refused_where_its_weights_are_shared_out(arguments, training, monkeypatch):
    settings = training()
    check_head(settings, [object()])
    launched("fsdp2", monkeypatch)
    check_head(settings, [])
    with pytest.raises(ValueError, match="share out the weights of the output head, which are trained here"):
        check_head(settings, [object()])
    wanted = arguments(train_embeddings=True)
    tied = Path(settings.output_dir).parent / "tied"
    shutil.copytree(wanted.model, tied)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    wanted.model = str(tied)
    with pytest.raises(ValueError, match="set train_embeddings=False"):
        prepare(wanted, settings)


def test_models_are_loaded_in_full_under_zero3(training, monkeypatch):
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    settings = training()
    with loaded_in_full(settings):
        pass
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", lambda: config)
    settings.deepspeed_plugin = SimpleNamespace(dschf=config)
    assert is_deepspeed_zero3_enabled()
    with loaded_in_full(settings):
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()


def test_weights_stay_gathered_only_inside_the_block():
    calls = []
    model = SimpleNamespace(
        set_reshard_after_backward=lambda on: calls.append(("reshard", on)),
        set_is_last_backward=lambda on: calls.append(("last", on)),
    )
    with pytest.raises(KeyError), gathered(model):
        assert calls == [("reshard", False), ("last", False)]
        raise KeyError
    assert calls[2:] == [("reshard", True), ("last", True)]
    with gathered(object()):
        pass
