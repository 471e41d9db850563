"""`petals chat` on a terminal with a real swarm: Ctrl-C, and the words of transformers."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from petals.testing.local_swarm import LocalSwarm
from support.pty_terminal import CTRL_C, CTRL_D, READY, on_a_terminal

QUESTION = "Name a colour of the sky."


@pytest.mark.slow
def test_a_chat_goes_on_after_ctrl_c(
    smollm2_path: Path, smollm2_local, tokenizer, smollm2_swarm: LocalSwarm, tmp_path: Path
) -> None:
    """Ctrl-C reaches all processes of the terminal; the client's network daemon must live on."""
    saved = tmp_path / "chat.json"
    command = [sys.executable, "-m", "petals.cli", "chat", str(smollm2_path)]
    command += ["--join", smollm2_swarm.initial_peers[0], "--max-new-tokens", "400"]
    environment = {**os.environ, "PETALS_CACHE": str(tmp_path)}
    with on_a_terminal(command, environment) as terminal:
        terminal.expect(READY, 120)
        terminal.type("Write a very long story about the sea.\r")
        terminal.expect("sea")
        for _ in range(5):
            terminal.expect(" the ", 60)
        terminal.type(CTRL_C)
        terminal.expect("Stopped, the answer so far is kept")
        terminal.expect(READY)
        terminal.type("/clear\r")
        terminal.expect(READY)
        terminal.type(QUESTION + "\r")
        terminal.expect("tokens/s", 120)
        terminal.expect(READY)
        terminal.type(f"/save {saved}\r")
        terminal.expect("2 messages written")
        terminal.expect(READY)
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
        assert "daemon ended" not in terminal.text and "Traceback" not in terminal.text

    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.inference_mode():
        local = smollm2_local.generate(ids, max_new_tokens=400, do_sample=False)
    expected = tokenizer.decode(local[0, ids.shape[1] :], skip_special_tokens=True)
    assert json.loads(saved.read_text()) == [*chat, {"role": "assistant", "content": expected}]
