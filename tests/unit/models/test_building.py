import threading

import torch
from torch.nn import init
from transformers import PreTrainedModel

from petals.models.checkpoint.arch import build_on_meta, describe
from petals.models.verify.tiny import tiny_config


def test_threads_that_build_at_once_leave_nothing_behind() -> None:
    before = (init.normal_, PreTrainedModel.init_weights)
    config = tiny_config("llama")
    base_class = describe(config).base_class
    start = threading.Barrier(4)

    def build() -> None:
        start.wait()
        for _ in range(20):
            build_on_meta(base_class, config)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (init.normal_, PreTrainedModel.init_weights) == before
    assert float(init.normal_(torch.zeros(100)).abs().sum()) > 0
