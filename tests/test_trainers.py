"""transformers' Trainer and TRL's SFTTrainer on compiled models, unmodified: eager's losses, and logits that nobody computes unless a metric reads them.

Everything but Inductor runs: `compile_fx` is replaced by `conftest.lower`.
"""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, lower, with_lora

import fastft
from fastft import _torch, deferred

pytest.importorskip("transformers")
sys.path.append(str(ROOT / "examples"))
STEPS, ROWS, LENGTH = 20, 64, 16


@pytest.fixture(autouse=True)
def lowered(monkeypatch):
    monkeypatch.setattr(_torch, "compile_fx", lambda gm, example_inputs, config_patches: lower(gm, example_inputs, config_patches))


@pytest.fixture(scope="module")
def tokenizer():
    from common import topics, train_tokenizer

    return train_tokenizer(topics()[0][:50], 320)


def model_for(tokenizer, compiled, lora=False):
    from common import small_llama

    model = small_llama(tokenizer, hidden=64, layers=1)
    model.config.use_cache = False
    if lora:
        model = with_lora(model)
    if compiled:
        model.compile(backend="fastft")
    return model


def rows(tokenizer):
    ids = (torch.arange(ROWS)[:, None] * 7 + torch.arange(LENGTH)) % 64  # every token tells the next
    labels = ids.masked_fill(torch.arange(LENGTH) < torch.arange(ROWS)[:, None] % 5, -100)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def settings(folder, **more):
    sizes = {"max_steps": STEPS, "save_steps": 10, "logging_steps": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    quiet = {"output_dir": str(folder), "disable_tqdm": True, "report_to": [], "use_cpu": True}
    # A large epsilon: Adam turns the rounding of a gradient that is nearly zero into a whole step.
    return sizes | quiet | {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "bf16": False} | more


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_close(found, expected, tolerance=2e-4):
    assert len(found) == len(expected)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance)


def accuracy(prediction):
    logits, labels = prediction
    assert type(logits) is np.ndarray and logits.dtype == np.float32
    counted = labels[:, 1:] != -100
    return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:])[counted].mean()), "sum": float(np.abs(logits).mean())}


def trained(tokenizer, folder, compiled, resume=None, lora=False):
    from transformers import Trainer, TrainingArguments

    data = rows(tokenizer)
    arguments = TrainingArguments(**settings(folder))
    model = model_for(tokenizer, compiled, lora)
    trainer = Trainer(model=model, args=arguments, train_dataset=data[:48], eval_dataset=data[48:], compute_metrics=accuracy)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("lora", [False, True])
def test_trainer(lora, tokenizer, tmp_path):
    eager = trained(tokenizer, tmp_path / "eager", False, lora=lora)
    before = deferred.computed()
    trainer = trained(tokenizer, tmp_path / "compiled", True, lora=lora)
    assert deferred.computed() == before and fastft.reports()[0].logits == "deferred"
    assert_close(losses(trainer), losses(eager))
    assert losses(trainer)[-1] < losses(trainer)[0]
    expected, found = eager.evaluate(), trainer.evaluate()
    assert deferred.computed() > before
    assert_close([found[f"eval_{name}"] for name in ("loss", "accuracy", "sum")], [expected[f"eval_{name}"] for name in ("loss", "accuracy", "sum")])
    before = deferred.computed()
    trainer.compute_metrics = None
    assert_close([trainer.evaluate()["eval_loss"]], [expected["eval_loss"]])
    assert deferred.computed() == before
    again = trained(tokenizer, tmp_path / "compiled", True, str(tmp_path / "compiled" / "checkpoint-10"), lora)
    assert deferred.computed() == before
    assert_close(losses(again), losses(eager))


def test_trainer_in_bf16(tokenizer, tmp_path):
    """accelerate wraps the forward in autocast and turns the outputs into float32."""
    from transformers import Trainer, TrainingArguments

    both, before = [], deferred.computed()
    for compiled in (False, True):
        arguments = TrainingArguments(**settings(tmp_path / str(compiled), max_steps=5, save_strategy="no", bf16=True))
        model = model_for(tokenizer, compiled)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows(tokenizer), eval_dataset=rows(tokenizer)[:8])
        trainer.train()
        assert deferred.computed() == before
        trainer.compute_metrics = accuracy
        both.append([*losses(trainer), trainer.evaluate()["eval_sum"]])
    assert_close(*both, tolerance=2e-2)
    assert deferred.computed() > before and {report.logits for report in fastft.reports()} == {"deferred"}


def test_metrics_of_training_logits(tokenizer, tmp_path):
    """A compute_loss that reads the logits, as TRL did before it fused the head: entropy and accuracy, without gradients."""
    from transformers import Trainer, TrainingArguments

    class Metrics(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            with torch.no_grad():
                probabilities = outputs.logits.float().log_softmax(-1)
                entropy = -(probabilities.exp() * probabilities).sum(-1).mean()
                hits = (outputs.logits[..., :-1, :].argmax(-1) == inputs["labels"][:, 1:]).sum()
            found.append([entropy.item(), float(hits)])
            return (loss, outputs) if return_outputs else loss

    both = []
    for compiled in (False, True):
        found, before = [], deferred.computed()
        arguments = TrainingArguments(**settings(tmp_path / str(compiled), max_steps=5, save_strategy="no"))
        trainer = Metrics(model=model_for(tokenizer, compiled), args=arguments, train_dataset=rows(tokenizer))
        trainer.train()
        both.append([*losses(trainer), *sum(found, [])])
        assert deferred.computed() - before == 5 * compiled
    assert_close(*both)


def sft(tokenizer, folder, compiled, resume=None):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows(tokenizer)])
    arguments = SFTConfig(**settings(folder, packing=False, max_length=LENGTH))
    trainer = SFTTrainer(
        model=model_for(tokenizer, compiled),
        args=arguments,
        train_dataset=data.select(range(48)),
        eval_dataset=data.select(range(48, 64)),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_sft_trainer(tokenizer, tmp_path):
    """TRL 1.16 replaces the head and its loss by its own; entropy and accuracy come from there, and logits are not made at all."""
    pytest.importorskip("trl")
    eager = sft(tokenizer, tmp_path / "eager", False)
    before = deferred.computed()
    trainer = sft(tokenizer, tmp_path / "compiled", True)
    assert deferred.computed() == before and fastft.reports()
    for name in ("loss", "entropy", "mean_token_accuracy"):
        expected, found = ([entry[name] for entry in trained.state.log_history if name in entry] for trained in (eager, trainer))
        assert_close(found, expected)
    assert_close([trainer.evaluate()["eval_loss"]], [eager.evaluate()["eval_loss"]])
    again = sft(tokenizer, tmp_path / "compiled", True, str(tmp_path / "compiled" / "checkpoint-10"))
    assert_close(losses(again), losses(eager))
