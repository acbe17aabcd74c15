"""IVONTrainingArguments: flags, files, `optim_args`, code, copies and pickles."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_ivon import IVONTrainingArguments
from hf_ivon.training.arguments import check_supported
from hf_ivon.training.presets import PRESETS

CPU = ["--output_dir", "out", "--use_cpu", "--report_to", "none"]


def parse(*flags):
    return HfArgumentParser((IVONTrainingArguments,)).parse_args_into_dataclasses([*CPU, *flags])[0]


def make(**settings):
    return IVONTrainingArguments(**{"output_dir": "out", "use_cpu": True, "report_to": [], **settings})


def test_ivon_is_a_name_on_the_command_line():
    """`--optim ivon` would be refused, or its flags not reach the optimizer."""
    flags = "--optim ivon --learning_rate 0.2 --ivon_ess 1e7 --ivon_hess_init 1e-3 --ivon_clip_radius inf"
    args = parse(*flags.split(), "--ivon_rescale_lr", "false", "--ivon_mc_samples", "2", "--ivon_prior_mean", "init")
    options = args.ivon_options()
    assert args.optim == "ivon"
    assert args.learning_rate == 0.2
    assert options["ess"] == 1e7
    assert options["hess_init"] == 1e-3
    assert options["clip_radius"] == float("inf")
    assert options["rescale_lr"] is False
    assert options["mc_samples"] == 2
    assert options["prior_mean"] == "init"


def test_defaults_are_the_papers_finetuning_setting():
    """Someone who only adds `--optim ivon` would train with something else than the documented defaults."""
    args = parse()
    assert (args.optim, args.learning_rate, args.weight_decay) == ("ivon", 0.1, 1e-5)
    expected = {"ess": "auto", "hess_init": 1.0, "beta1": 0.9, "beta2": 0.99999, "clip_radius": 1e-3, "mc_samples": 1}
    expected |= {"rescale_lr": True, "debias": True, "hess_approx": "price", "prior_mean": "zero", "prior_on": "all"}
    expected |= {
        "batch_size": "auto",
        "relative_sigma": 0.0,
        "temperature": 1.0,
        "eval_ess_scale": 1.0,
        "momentum_dtype": "float32",
        "low_memory": False,
        "foreach": None,
        "fused": None,
    }
    assert args.ivon_options() == {**expected, "seed": args.seed}


def test_presets_fill_what_is_not_set():
    """`--ivon_preset` would not reach the optimizer, or would overrule what the user says."""
    args = parse("--ivon_preset", "finetuning", "--ivon_beta1", "0.8", "--ivon_temperature", "0.1")
    preset, options = PRESETS["finetuning"], args.ivon_options()
    assert (args.learning_rate, args.weight_decay) == (preset["learning_rate"], preset["weight_decay"])
    assert (options["hess_approx"], options["beta2"], options["beta1"]) == ("fisher", preset["beta2"], 0.8)
    assert (options["ess"], options["temperature"], options["relative_sigma"]) == (
        "auto",
        0.1,
        preset["relative_sigma"],
    )
    assert "preset" not in options
    assert options["hess_init"] == 1e-6, "1 would be a thousand times the curvature that is learnt"
    assert make(ivon_hess_approx="fisher", ivon_hess_init=0.1).ivon_options()["hess_init"] == 0.1
    # Who gives what `relative_sigma` sets means it, also beside a preset.
    for flags in (["finetuning", "--weight_decay", "0.01"], ["pretraining", "--ivon_hess_init", "0.3"]):
        args = parse("--ivon_preset", *flags)
        assert args.ivon_options()["relative_sigma"] == 0
    assert args.ivon_options()["hess_init"] == 0.3
    # A temperature is for what the loss averages over: beside the preset's own number it would do nothing.
    assert make(ivon_preset="pretraining").ivon_options()["ess"] == PRESETS["pretraining"]["ess"]
    assert make(ivon_preset="pretraining", ivon_temperature=1.0).ivon_options()["ess"] == "auto"
    again = dataclasses.replace(parse("--ivon_preset", "finetuning"), ivon_beta1=0.5)
    assert again.ivon_options()["relative_sigma"] == preset["relative_sigma"]
    written = parse("--optim_args", "preset=pretraining,fused=false")
    assert written.learning_rate == PRESETS["pretraining"]["learning_rate"]
    assert written.ivon_options()["fused"] is False
    assert make().set_optimizer("ivon", args="preset=pretraining").learning_rate == written.learning_rate


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_in_range(preset):
    """A preset would be refused by the optimizer after the model and data have been loaded."""
    options = make(ivon_preset=preset).ivon_options()
    assert options.keys() == make().ivon_options().keys()


def test_another_optimizer_has_its_usual_defaults():
    """The AdamW baseline would run with IVON's learning rate, or not at all."""
    args = parse("--optim", "adamw_torch")
    plain = TrainingArguments("out", optim="adamw_torch", use_cpu=True, report_to=[])
    assert (args.optim, args.learning_rate, args.weight_decay) == (plain.optim, 5e-5, 0.0)
    assert type(args.optim) is type(plain.optim)
    with pytest.raises(ValueError, match="adamw_torhc"):
        make(optim="adamw_torhc")


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_settings_from_a_file(tmp_path, form):
    """A recipe's settings file would be misread; YAML takes `1e-3` for a string."""
    text = {
        "json": json.dumps({"output_dir": "out", "use_cpu": True, "learning_rate": 0.2, "ivon_ess": 1e7,
                            "ivon_hess_init": "1e-3", "ivon_debias": False}),
        "yaml": "output_dir: out\nuse_cpu: true\nlearning_rate: 2e-1\nivon_ess: 1e7\nivon_hess_init: 1e-3\n"
                "ivon_debias: false\n",
    }[form]  # fmt: skip
    path = tmp_path / f"settings.{form}"
    path.write_text(text)
    parser = HfArgumentParser((IVONTrainingArguments,))
    (args,) = parser.parse_json_file(path) if form == "json" else parser.parse_yaml_file(path)
    options = args.ivon_options()
    assert (args.learning_rate, options["ess"], options["hess_init"], options["debias"]) == (0.2, 1e7, 1e-3, False)


def test_optim_args_fill_the_same_options():
    """`--optim_args` and the flags would be two configurations, not one."""
    written = "ess=1e7, hess_init=1e-3,mc_samples=2,debias=false,prior_on=decay,seed=7,clip_radius=inf"
    args = parse("--optim_args", written, "--ivon_beta1", "0.8", "--ivon_ess", "10000000")
    options = args.ivon_options()
    expected = {"ess": 1e7, "hess_init": 1e-3, "mc_samples": 2, "debias": False, "prior_on": "decay", "seed": 7}
    assert {**expected, "beta1": 0.8, "clip_radius": float("inf")}.items() <= options.items()
    assert isinstance(options["mc_samples"], int)
    assert make(optim_args="seed=12345678901234567").ivon_options()["seed"] == 12345678901234567
    assert make(optim_args="mc_samples=1e1").ivon_options()["mc_samples"] == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim_args": "ess=1e7,hess=1"}, r"`optim_args`.*keys batch_size, beta1, beta2, .*got 'hess=1'"),
        ({"optim_args": "lr=0.1"}, r"keys .*got 'lr=0.1'.*`learning_rate` and `weight_decay`"),
        ({"optim_args": "ess"}, r"key=value,.*got 'ess'"),
        ({"optim_args": "ess=1,ess=2"}, r"each option once, got ess twice"),
        ({"optim_args": "ess=1e7", "ivon_ess": "1e8"}, r"`ivon_ess` must agree.*100000000.*ess=10000000.*once"),
        ({"optim_args": "debias=maybe"}, r"`debias` must be true or false, got 'maybe'"),
        ({"optim_args": "beta1=x"}, r"`beta1` must be a number, got 'x'"),
        ({"optim_args": "beta2=1"}, r"`beta2` must be in \[0, 1\), got 1"),
        ({"ivon_ess": "-5"}, r"`ivon_ess` must be a positive number, got -5.0\. Pass the number of training"),
        ({"ivon_ess": "0"}, r"`ivon_ess` must be a positive number"),
        ({"ivon_hess_init": 0.0}, r"`ivon_hess_init` must be a positive number"),
        ({"ivon_mc_samples": 0}, r"`ivon_mc_samples` must be an integer of at least 1"),
        ({"ivon_clip_radius": 0.0}, r"`ivon_clip_radius` must be a positive number or inf"),
        ({"ivon_hess_approx": "ggn"}, r"`ivon_hess_approx` must be 'fisher', 'gradsq' or 'price'"),
        ({"ivon_batch_size": "0"}, r"`ivon_batch_size` must be a positive number, got 0.0"),
        ({"ivon_prior_mean": "given"}, r"`ivon_prior_mean` must be 'zero' or 'init'"),
        ({"ivon_prior_on": "none"}, r"`ivon_prior_on` must be one of all, decay"),
        ({"ivon_preset": "finetuning", "ivon_prior_on": "decay"},
         r"`ivon_prior_on` must be 'all' with hess_approx='fisher' \(presets finetuning and averaging\), got 'decay'"),
        ({"optim_args": "preset=averaging,prior_on=decay"}, r"`prior_on` must be 'all' with hess_approx='fisher'"),
        ({"ivon_preset": "finetuning", "weight_decay": 0.0},
         r"`weight_decay` must be above 0 with hess_approx='fisher' .* leave --weight_decay out"),
        ({"ivon_preset": "fast"}, r"`preset` must be one of paper, finetuning, averaging, pretraining, got 'fast'"),
        ({"ivon_hess_init": 0.1, "ivon_relative_sigma": 0.1},
         r"`relative_sigma` must be left out where `hess_init` is given, got 0.1 and 0.1: it sets that"),
        ({"weight_decay": 0.1, "ivon_hess_approx": "fisher", "ivon_relative_sigma": 0.2},
         r"`relative_sigma` must be left out where `weight_decay` is given, got 0.2 and 0.1"),
        ({"ivon_preset": "finetuning", "ivon_relative_sigma": 0.0},
         r"`weight_decay` must be given with this preset .*Pass --weight_decay"),
        ({"ivon_preset": "finetuning", "ivon_hess_approx": "price"}, r"`weight_decay` must be given with this preset"),
        ({"ivon_ess": "1e7", "ivon_temperature": 0.1}, r"`temperature` must be left out where `ess` is a number"),
        ({"ivon_relative_sigma": -1.0}, r"`ivon_relative_sigma` must be a number of at least 0, got -1.0\. 0.05"),
        ({"ivon_temperature": 0.0}, r"`ivon_temperature` must be a positive number, got 0.0"),
        ({"ivon_fused": "maybe"}, r"`fused` must be true or false, got 'maybe'"),
        ({"ivon_seed": -1}, r"`ivon_seed` must be an integer"),
        ({"learning_rate": -1.0}, r"`learning_rate` must be a number of at least 0"),
        ({"learning_rate": "fast"}, r"`learning_rate` must be a number, got 'fast'"),
        ({"weight_decay": -1e-5}, r"`weight_decay` must be a number of at least 0"),
        ({"fsdp": "full_shard", "fsdp_config": {"version": 1}}, r"does not support FSDP1\. Set version 2"),
        ({"fsdp": "full_shard", "ivon_low_memory": True}, r"does not support low_memory with FSDP\. Leave it out"),
        ({"ivon_low_memory": True, "ivon_hess_approx": "gradsq"}, r"`ivon_low_memory` must go with `hess_approx"),
        ({"fsdp": "full_shard", "ivon_mc_samples": 2}, r"does not support mc_samples above 1 with FSDP\. Set it to 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(settings, message):
    """A typo or a contradiction would go unnoticed until hours of training are done, or its message would not help."""
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_deepspeed_is_refused():
    """Its step runs inside the backward pass, at the weight sample."""
    fine = {"deepspeed_plugin": None, "fsdp": None, "fsdp_config": None, "optim": "adamw_torch"}
    check_supported(SimpleNamespace(**fine))
    with pytest.raises(ValueError, match="DeepSpeed"):
        check_supported(SimpleNamespace(**{**fine, "deepspeed_plugin": object()}))


def test_help_describes_every_option(capsys):
    """`--help` would fail (a bare percent sign breaks argparse), or an option would have no description."""
    with pytest.raises(SystemExit):
        parse("--help")
    printed = capsys.readouterr().out
    own = set(IVONTrainingArguments.__annotations__)
    assert own >= {f"ivon_{name}" for name in ("ess", "beta1", "prior_on")}
    for field in dataclasses.fields(IVONTrainingArguments):
        if field.name in own:
            assert field.metadata["help"]
            assert f"--{field.name}" in printed


def test_dictionary_round_trip():
    """Arguments written to JSON would read back as others."""
    args = make(ivon_ess="1e7", ivon_clip_radius=float("inf"), optim_args="hess_init=0.5")
    again = IVONTrainingArguments(**json.loads(args.to_json_string()))
    assert again.to_dict() == args.to_dict()
    assert again.ivon_options() == args.ivon_options()
    assert args.to_dict()["optim"] == "ivon"


def test_replace_changes_one_field():
    """`dataclasses.replace`, as sweeps use it, would fail on the name or lose options."""
    args = dataclasses.replace(make(ivon_ess=5.0), ivon_beta1=0.5)
    assert (args.optim, args.ivon_options()["ess"], args.ivon_options()["beta1"]) == ("ivon", 5.0, 0.5)
    assert dataclasses.replace(args, optim="sgd", ivon_ess=None, ivon_beta1=None).optim == "sgd"


def test_set_optimizer():
    """The fluent setter would refuse the name, or leave AdamW's learning rate behind."""
    args = make(optim="adamw_torch").set_optimizer("ivon", beta1=0.8, args="ess=9")
    assert (args.optim, args.learning_rate, args.weight_decay) == ("ivon", 0.1, 1e-5)
    assert args.ivon_options()["beta1"] == 0.8
    assert args.ivon_options()["ess"] == 9
    args.set_optimizer("adamw_torch", learning_rate=1e-4, beta2=0.95, epsilon=1e-6)
    assert (args.optim, args.learning_rate, args.weight_decay) == ("adamw_torch", 1e-4, 0.0)
    assert (args.adam_beta2, args.adam_epsilon) == (0.95, 1e-6)
    with pytest.raises(ValueError, match="`epsilon` must be left out"):
        args.set_optimizer("ivon", epsilon=1e-8)
    with pytest.raises(ValueError, match="`ivon_beta1` must be in"):
        args.set_optimizer("ivon", beta1=1.5)


def test_options_without_effect_are_named(caplog):
    """Options of IVON beside another optimizer would silently do nothing."""
    make(optim="sgd", ivon_ess=5.0, ivon_seed=3)
    assert "No effect with optim='sgd': ivon_ess, ivon_seed" in caplog.text


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_copies_keep_their_class(copier):
    """A sweep that copies its arguments would lose IVON's options."""
    args = make(ivon_ess=5.0)
    other = copier(args)
    assert type(other) is IVONTrainingArguments
    assert other == args
    other.ivon_ess = 6.0
    assert args.ivon_ess == 5.0


def test_pickle_opens_without_the_package(tmp_path):
    """`training_args.bin` stands in every checkpoint; who downloads one may not have hf_ivon."""
    args = make(ivon_ess=5.0)
    torch.save(args, tmp_path / "training_args.bin")
    script = (
        "import sys; sys.modules['hf_ivon'] = None\n"
        "import torch\n"
        "args = torch.load(sys.argv[1], weights_only=False)\n"
        "print(type(args).__name__, args.optim, args.ivon_ess, args.to_dict()['optim'])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "training_args.bin")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["TrainingArguments", "ivon", "5.0", "ivon"]
    again = pickle.loads(pickle.dumps(args))
    assert IVONTrainingArguments.ivon_options(again) == args.ivon_options()
