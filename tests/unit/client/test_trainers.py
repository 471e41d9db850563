"""The usual tools train a tuned model: Trainer, accelerate, accumulated gradients, checkpoints."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from petals.client.tuning.prompts import TuningConfig, add_prompts
from petals.models.loading.head import HeadKind
from support.local_blocks import tiny_pair
from support.tuned_reference import TunedReference

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 90, (8, 9), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1] * 4)
RATE = 0.05


def classifier():
    """(reference, tuned model), both with a head to train."""
    local, remote = tiny_pair("llama", HeadKind.SEQUENCE_CLASSIFICATION)
    torch.manual_seed(3)
    tuning = TuningConfig(tuning_mode="deep_ptune", pre_seq_len=3)
    add_prompts(remote.blocks_host, tuning, len(remote.remote_blocks))
    remote.score.requires_grad_()
    remote.config.name_or_path = "somewhere/tiny"
    reference = TunedReference.of(local, remote)
    reference.model.score.requires_grad_()
    return reference, remote


def reference_losses(reference, batches, optimizer):
    losses = []
    for rows in batches:
        logits = reference.states(IDS[rows])[:, -1] @ reference.model.score.weight.T
        loss = torch.nn.functional.cross_entropy(logits, LABELS[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)


def arguments(folder, **more):
    options = {
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **(options | more))


class InOrder(Trainer):
    """Batches without shuffling, so that losses can be compared."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(DATA)


DATA = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, LABELS)]
HALVES = [slice(0, 4), slice(4, 8)]


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_takes_the_steps_of_the_reference(tmp_path):
    reference, remote = classifier()
    trainer = InOrder(remote, arguments(tmp_path, gradient_checkpointing=True), train_dataset=DATA)
    trainer.train()
    leaves = [*reference.leaves, reference.model.score.weight]
    expected = reference_losses(reference, HALVES * 2, adam(leaves))
    assert losses_of(trainer) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]


def test_trainer_accumulates_gradients_as_for_the_local_model(tmp_path):
    found = []
    for model in tiny_pair("llama", HeadKind.SEQUENCE_CLASSIFICATION):
        model.requires_grad_(False).score.requires_grad_()
        more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = InOrder(model, arguments(tmp_path, **more), train_dataset=DATA)
        trainer.train()
        found.append((losses_of(trainer), model.score.weight))
    (expected, weight), (actual, trained) = found
    assert actual == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(trained, weight, rtol=0, atol=1e-4)


def test_trainer_and_accelerate_in_mixed_precision(tmp_path):
    found = []
    for model in tiny_pair("llama", HeadKind.SEQUENCE_CLASSIFICATION):
        model.requires_grad_(False).score.requires_grad_()
        trainer = InOrder(model, arguments(tmp_path, bf16=True), train_dataset=DATA)
        trainer.train()
        found.append(losses_of(trainer))
    assert found[1] == pytest.approx(found[0], rel=0.03)
    assert found[1][-1] < found[1][0]
    _, remote = classifier()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = adam([p for p in remote.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(remote, optimizer)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=LABELS).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "saved")


def test_trainer_resumes_from_a_checkpoint(tmp_path):
    _, undisturbed = classifier()
    whole = InOrder(undisturbed, arguments(tmp_path / "whole"), train_dataset=DATA)
    whole.train()
    _, first = classifier()
    saving = {"save_strategy": "steps", "save_steps": 2}
    InOrder(first, arguments(tmp_path / "cut", max_steps=2, **saving), train_dataset=DATA).train()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert sorted(saved) == sorted(n for n, p in first.named_parameters() if p.requires_grad)
    _, second = classifier()
    trainer = InOrder(second, arguments(tmp_path / "cut", **saving), train_dataset=DATA)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(trainer)[2:] == pytest.approx(losses_of(whole)[2:], abs=1e-5)
    for name, parameter in second.named_parameters():
        torch.testing.assert_close(parameter, undisturbed.get_parameter(name))


def test_accelerate_takes_the_steps_of_the_reference(tmp_path):
    reference, remote = classifier()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = adam([p for p in remote.parameters() if p.requires_grad])
    loader = DataLoader(DATA, batch_size=2)
    model, optimizer, loader = accelerator.prepare(remote, optimizer, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    leaves = [*reference.leaves, reference.model.score.weight]
    expected = reference_losses(reference, HALVES, adam(leaves))
    means = [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
    assert means == pytest.approx(expected, abs=1e-4)
    accelerator.unwrap_model(model).save_pretrained(tmp_path)
    assert "score.weight" in load_file(tmp_path / "model.safetensors")
