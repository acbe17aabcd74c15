"""Code that nobody here wrote, run unchanged through the launcher: TRL's scripts, sentence-transformers' trainer."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_ivon import load_posterior
from tests import processes, tiny

ROOT = Path(__file__).parent.parent
FLAGS = {
    "optim": "ivon",
    "optim_args": "ess=1e4,hess_init=0.1,beta2=0.9",
    "learning_rate": 0.1,
    "max_steps": 3,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": "true",
}
LORA = {"use_peft": "true", "lora_r": 2, "lora_target_modules": ".*(c_attn|c_proj)"}


@pytest.fixture
def work(tmp_path):
    """A tiny GPT-2 and two data sets, in directories as a download would leave them."""
    sentences = [f"The number {i} is smaller than the number {i + 1}, and so on." for i in range(32)]
    tiny.save_gpt2(tmp_path / "gpt2", sentences, 256)
    text = [{"text": s} for s in sentences]
    pairs = [{"prompt": s[:20], "chosen": s[20:], "rejected": " nonsense."} for s in sentences]
    for name, rows in (("text", text), ("pairs", pairs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def launch(directory, *command, num=1):
    done = processes.launch(directory, num, "run", *command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def flags(options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def script(name):
    return str(Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "scripts" / f"{name}.py")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize(("name", "data"), [("sft", "text"), ("dpo", "pairs")])
def test_trl_scripts_run_as_shipped(work, name, data, lora):
    """What people really start: the script of a library, which knows nothing of IVON."""
    options = {"model_name_or_path": "gpt2", "dataset_name": data, "output_dir": "out", **(LORA if lora else {})}
    output = launch(work, script(name), *flags({**options, **FLAGS}))
    assert "ivon_sigma_q50" in output
    for directory in ("checkpoint-2", "checkpoint-3", "."):
        posterior = load_posterior(work / "out" / directory)
        assert posterior.config.ess == 1e4
        mean = load_file(work / "out" / directory / ("adapter_model.safetensors" if lora else "model.safetensors"))
        assert set(posterior.names()) <= set(mean)
        assert all("lora_" in key for key in posterior.names()) is lora
    assert posterior.config.steps == 3


SENTENCE_TRANSFORMERS = """
import datasets
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses, models
from sentence_transformers import SentenceTransformerTrainingArguments

word = models.Transformer("bert", max_seq_length=32)
if {lora}:
    word.auto_model.add_adapter(LoraConfig(r=2, target_modules=["query", "value"]))
model = SentenceTransformer(modules=[word, models.Pooling(word.get_word_embedding_dimension())], device="cpu")
rows = [{{"a": f"number {{i}}", "b": f"the number {{i}}", "label": i % 3}} for i in range(16)]
args = SentenceTransformerTrainingArguments(
    output_dir="out", optim="ivon", optim_args="ess=1e4,hess_init=0.1,beta2=0.9", learning_rate=0.1, max_steps=3,
    per_device_train_batch_size=4, save_steps=2, report_to="none", use_cpu=True, logging_steps=1,
)
loss = losses.SoftmaxLoss(model, model.get_sentence_embedding_dimension(), num_labels=3)
base = [p for p in model.parameters() if not p.requires_grad]
before = [p.detach().clone() for p in base]
start = loss.classifier.weight.detach().clone()
trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), loss=loss)
trainer.train()
trainer.save_model()
same = all(bool((p == q).all()) for p, q in zip(base, before))
print("moved", bool((loss.classifier.weight != start).any()), same, type(trainer.optimizer.optimizer).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("num", [1, 2])
def test_sentence_transformers_trainer_as_shipped(work, num, lora):
    """Its losses have weights of their own, which must be trained too; its model is no PreTrainedModel."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "gpt2")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32)).save_pretrained(work / "bert")
    tokenizer.save_pretrained(work / "bert")
    (work / "script.py").write_text(SENTENCE_TRANSFORMERS.format(lora=lora))
    output = launch(work, "script.py", num=num)
    assert output.count("moved True True IVON") == num
    assert load_posterior(work / "out" / "checkpoint-3").config.steps == 3
    posterior = load_posterior(work / "out")
    assert posterior.config.num_examples == 16
    assert all("lora_" in name for name in posterior.names()) is lora
