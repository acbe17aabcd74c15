"""`--optim ivon` in scripts and Trainer classes that know nothing of this package."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from hf_ivon import IVONTrainer, load_posterior
from hf_ivon.checkpoint import posterior_files
from tests import tiny

ROOT = Path(__file__).parent.parent
OPTIM_ARGS = "ess=1e4,hess_init=0.1,beta2=0.9"


@pytest.fixture
def auto():
    import hf_ivon.auto as module

    module.enable()
    yield module
    module.disable()


def arguments(directory, cls=TrainingArguments, **settings):
    """The stock arguments that equal `tiny.arguments`."""
    own = tiny.arguments(directory)
    names = ("max_steps", "per_device_train_batch_size", "learning_rate", "logging_steps", "use_cpu", "disable_tqdm")
    shared = {name: getattr(own, name) for name in names}
    defaults = {**shared, "report_to": [], "save_strategy": "no", "weight_decay": 1e-3, "optim": "ivon"}
    if settings.get("optim", "ivon") == "ivon":
        defaults["optim_args"] = OPTIM_ARGS
    return cls(output_dir=str(directory), **{**defaults, **settings})


class Plain(Trainer):
    """Replaces the training step without calling the base class."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class Polite(Trainer):
    """Adds something to the training step and calls the base class."""

    def training_step(self, *args, **kwargs):
        self.seen = getattr(self, "seen", 0) + 1
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("cls", [Trainer, Plain, Polite])
def test_any_trainer_class_trains_as_ivon_trainer_does(tmp_path, auto, cls):
    """A class that overrides the step would train at the mean, or with another loss scale."""
    expected = IVONTrainer(model=tiny.gpt2(), args=tiny.arguments(tmp_path / "own"), train_dataset=tiny.text())
    expected.train()
    trainer = cls(model=tiny.gpt2(), args=arguments(tmp_path / "stock"), train_dataset=tiny.text())
    trainer.train()
    trainer.save_model()
    assert isinstance(trainer, cls)
    assert type(trainer).__name__ == cls.__name__
    for p, q in zip(trainer.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(p, q)
    found, known = load_posterior(tmp_path / "stock", trainer.model), expected.posterior()
    assert all(torch.equal(found.variance[k], known.variance[k]) for k in known.names())
    assert cls is not Polite or trainer.seen == 4


def test_sequence_to_sequence_trainers_are_trainers(tmp_path, auto):
    """Seq2SeqTrainer has arguments of its own class."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    args = arguments(tmp_path, Seq2SeqTrainingArguments, save_strategy="steps", save_steps=2)
    data = [{"input_ids": [3, 4, 5, 1], "labels": [5, 4, 3, 1]}] * 16
    Seq2SeqTrainer(model=model, args=args, train_dataset=data).train()
    assert load_posterior(tmp_path / "checkpoint-4", model).config.num_tokens == 16 * 4


def test_the_name_survives_every_road(tmp_path, auto):
    """Arguments travel as flags, JSON, copies and pickles; a lost name would train with AdamW, or not at all."""
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([
        "--output_dir",
        str(tmp_path),
        "--optim",
        "ivon",
        "--use_cpu",
        "true",
        "--report_to",
        "none",
    ])
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": "x", "optim": "ivon", "use_cpu": True}))
    (from_file,) = HfArgumentParser(TrainingArguments).parse_json_file(str(tmp_path / "args.json"))
    made = [parsed, from_file, dataclasses.replace(parsed, seed=3), parsed.set_optimizer("ivon", learning_rate=0.1)]
    made.append(TrainingArguments(**json.loads(parsed.to_json_string())))
    assert [args.optim for args in made] == ["ivon"] * 5
    assert pickle.loads(pickle.dumps(parsed)).optim == "ivon"
    assert OptimizerNames("ivon") in list(OptimizerNames)


def test_arguments_open_without_the_package(tmp_path, auto):
    """Every directory and push holds `training_args.bin`; it must open where hf_ivon was never heard of."""
    trainer = Trainer(model=tiny.gpt2(), args=arguments(tmp_path), train_dataset=tiny.text())
    trainer.save_model()
    code = (
        "import sys, torch; a = torch.load(sys.argv[1], weights_only=False); print(a.optim, 'hf_ivon' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "training_args.bin")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["ivon", "False"]


def test_other_optimizers_do_not_notice(tmp_path, auto):
    """Whoever imports a module that imports this one must get the AdamW they asked for."""
    before, after = [], []
    for enabled, weights in ((False, before), (True, after)):
        auto.enable() if enabled else auto.disable()
        trainer = Trainer(model=tiny.gpt2(), args=arguments(tmp_path, optim="adamw_torch"), train_dataset=tiny.text())
        trainer.train()
        trainer.save_model()
        assert type(trainer) is Trainer
        weights += [p.detach().clone() for p in trainer.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not posterior_files(tmp_path)


def test_disable_takes_everything_back(tmp_path, auto):
    """A notebook must get back the library that it started with."""
    auto.disable()
    before, names = dict(vars(Trainer)), list(OptimizerNames)
    assert "ivon" not in [name.value for name in names]
    auto.enable()
    assert Trainer.train is not before["train"]
    auto.disable()
    assert dict(vars(Trainer)) == before
    assert list(OptimizerNames) == names
    with pytest.raises(ValueError, match="ivon is not a valid OptimizerNames"):
        arguments(tmp_path)
    auto.enable()
    assert arguments(tmp_path).optim == "ivon"


def test_arguments_changed_after_construction_count(tmp_path, auto):
    """`args.set_optimizer("ivon")` between construction and `train()` would train at the mean."""
    trainer = Trainer(model=tiny.gpt2(), args=arguments(tmp_path, optim="adamw_torch"), train_dataset=tiny.text())
    trainer.args.set_optimizer("ivon", learning_rate=0.1, args=OPTIM_ARGS)
    trainer.train()
    assert trainer.posterior().config.steps == 4


def test_the_usual_weight_decay_of_zero_is_no_prior(tmp_path, auto, caplog):
    """Stock arguments have 0 unless told otherwise, which would be a posterior without a prior."""
    trainer = Trainer(model=tiny.gpt2(), args=arguments(tmp_path, weight_decay=0.0), train_dataset=tiny.text())
    trainer.train()
    assert trainer.posterior().config.weight_decay == 1e-5
    assert "set to 1e-05" in caplog.text


@pytest.mark.parametrize(("prior_on", "flat"), [("all", 0.01), ("decay", 0.0)])
def test_groups_of_the_scripts_own_keep_their_prior(tmp_path, auto, prior_on, flat):
    """Priors that the script chose would be overwritten; groups without one would get none, or the optimizer's."""

    class Own(Trainer):
        def create_optimizer(self, model=None):
            cls, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
            first, second, third, *rest = self.model.parameters()
            groups = [{"params": [first], "weight_decay": 0.3}, {"params": [second], "weight_decay": 1e-4}]
            self.optimizer = cls([*groups, {"params": [third], "weight_decay": 0.0}, {"params": rest}], **options)
            return self.optimizer

    args = arguments(tmp_path, weight_decay=0.01, optim_args=f"ess=1e4,prior_on={prior_on}")
    trainer = Own(model=tiny.bert(), args=args, train_dataset=tiny.sentences())
    trainer.train()
    assert [group["weight_decay"] for group in trainer.ivon.param_groups] == [0.3, 1e-4, flat, 0.01]


def test_presets_reach_a_script_that_nobody_edits(tmp_path, auto, caplog):
    """The preset would be refused by stock arguments, or the prior that it sets be another than is said."""
    options = {"optim_args": "preset=finetuning", "learning_rate": 0.1, "weight_decay": 0.0}
    trainer = Trainer(model=tiny.bert(), args=arguments(tmp_path, **options), train_dataset=tiny.sentences(8))
    trainer.train()
    config = trainer.posterior().config
    assert (config.estimator, config.ess) == ("ivon-fisher", 8 / 0.005)
    assert f"set to {config.weight_decay:.3g}." in caplog.text


def test_what_cannot_be_right_is_refused(tmp_path, auto, monkeypatch):
    """Generating with weight samples, or an optimizer of the script's own, would train something else silently."""
    module = ModuleType("trl.trainer.grpo_trainer")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    grpo = type("GRPOTrainer", (Trainer,), {"__module__": module.__name__})
    mine = type("Mine", (grpo,), {})
    with pytest.raises(ValueError, match="GRPOTrainer: it generates inside its training step.*SFT, DPO"):
        mine(model=tiny.gpt2(), args=arguments(tmp_path), train_dataset=tiny.text())

    class Own(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            return self.optimizer

    with pytest.raises(ValueError, match="`Own.create_optimizer` must make what `optim` names, got AdamW for 'ivon'"):
        Own(model=tiny.gpt2(), args=arguments(tmp_path), train_dataset=tiny.text()).train()


SCRIPT = """
import sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    sizes = dict(vocab_size=29, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    rows = torch.randint(0, 29, (16, 8))
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
    trainer.train()
    trainer.save_model()
    print("main module:", sys.argv[0])
"""


@pytest.mark.parametrize("as_module", [False, True])
def test_an_unmodified_script_runs(tmp_path, as_module):
    """The road without a line of code: nothing in the script knows of IVON."""
    (tmp_path / "train_it.py").write_text(SCRIPT)
    target = ["-m", "train_it"] if as_module else [str(tmp_path / "train_it.py")]
    flags = "--optim ivon --learning_rate 0.1 --max_steps 4 --save_steps 2 --use_cpu true --report_to none".split()
    command = [sys.executable, "-m", "hf_ivon", "run", *target, "--output_dir", "out", *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "--optim_args", OPTIM_ARGS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "train_it" in done.stdout
    for directory in ("checkpoint-2", "checkpoint-4", "."):
        posterior = load_posterior(tmp_path / "out" / directory)
        assert posterior.config.ess == 1e4
    assert posterior.config.steps == 4


def test_the_launcher_leaves_the_scripts_arguments_alone(tmp_path):
    """`--help` after the script is the script's; a script that is not there is one line."""
    (tmp_path / "script.py").write_text("import sys; print('got', sys.argv[1:])")
    command = [sys.executable, "-m", "hf_ivon", "run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, "script.py", "--help", "-m", "x"], **run)
    assert "got ['--help', '-m', 'x']" in done.stdout
    done = subprocess.run([*command, "nothing.py"], **run)
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr


FAILURES = {
    "raise EOFError('no more')": ("EOFError: no more", 1),
    "raise BrokenPipeError(32, 'Broken pipe')": ("BrokenPipeError: [Errno 32] Broken pipe", 1),
    "raise KeyboardInterrupt": ("KeyboardInterrupt", 130),
    "import click; raise click.UsageError('inner')": ("UsageError: inner", 1),
    "raise ValueError('boom')": ("ValueError: boom", 1),
    "sys.exit('said')": ("said", 1),
    "sys.exit(3)": ("", 3),
}


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("line", FAILURES)
def test_a_script_fails_as_it_would_under_python(tmp_path, monkeypatch, capsys, auto, line, as_module):
    """The command line's own handling of errors would hide where the script failed, or that it failed at all."""
    from hf_ivon.cli.main import app

    (tmp_path / "failing.py").write_text(f"import sys\n\n\ndef fail():\n    {line}\n\n\nfail()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["hf-ivon"])
    with pytest.raises(SystemExit) as left:
        app(args=["run", *(["-m", "failing"] if as_module else ["failing.py"])])
    message, code = FAILURES[line]
    printed = capsys.readouterr().err
    if line.startswith("sys.exit"):  # which Python itself prints at the very end
        assert (left.value.code, printed) == (message or code, "")
        return
    assert left.value.code == code
    assert printed.strip().endswith(message)
    assert printed.startswith("Traceback")
    assert printed.count("File ") == 2, "the first frame must be the script's"
    assert 'failing.py", line 5, in fail' in printed
