"""A script in the manner of the original's benchmarks: processes that measure, one line of result.

Usage: original_script.py TASK MODEL ADDRESS. Its imports and calls are those of the original.
"""

import multiprocessing as mp
import sys
from time import perf_counter

import numpy as np
import torch
from hivemind.utils.logging import get_logger
from transformers import AutoTokenizer

from petals import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)
from petals.constants import DTYPE_MAP

logger = get_logger()


@torch.inference_mode()
def inference(name, peers, results):
    tokenizer = AutoTokenizer.from_pretrained(name, use_fast=False)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        name, initial_peers=peers, torch_dtype=DTYPE_MAP["float32"]
    )
    text, times = "", []
    with model.transformer.h.inference_session(max_length=6) as session:
        for step in range(6):
            began = perf_counter()
            outputs = model.generate(max_new_tokens=1, session=session)
            text += tokenizer.decode(outputs[0])
            times.append(perf_counter() - began)
            logger.info(f"{step=} {text=}")
    results.send(1 / np.mean(times))


@torch.inference_mode()
def forward(name, peers, results):
    model = AutoDistributedModel.from_pretrained(
        name, initial_peers=peers, torch_dtype=DTYPE_MAP["bfloat16"]
    )
    ids = torch.randint(0, model.config.vocab_size, size=(2, 8))
    began = perf_counter()
    assert model(ids).last_hidden_state.shape[:2] == ids.shape
    results.send(ids.numel() / (perf_counter() - began))


def training(name, peers, results):
    model = AutoDistributedModelForSequenceClassification.from_pretrained(
        name, initial_peers=peers, tuning_mode="deep_ptune", pre_seq_len=4, num_labels=2
    )
    model = model.to("cpu")
    optimizer = torch.optim.Adam(model.parameters())
    began = perf_counter()
    for _ in range(2):
        ids = torch.randint(0, model.config.vocab_size, size=(2, 8))
        model(ids, labels=torch.randint(0, 2, size=[2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    results.send(2 * ids.numel() / (perf_counter() - began))


def main():
    task, name, peer = sys.argv[1:]
    receiver, sender = mp.Pipe(duplex=False)
    target = {"inference": inference, "forward": forward, "training": training}[task]
    processes = [mp.Process(target=target, args=(name, [peer], sender)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    speed = np.mean([receiver.recv() for _ in processes])
    logger.info(f"Final result: {speed=:.2f}")


if __name__ == "__main__":
    main()
