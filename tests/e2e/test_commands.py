"""What people type: `petals demo`, `swarm up`, `status`, `generate`, as real processes."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from petals.testing.tiny_models import write_tiny_model
from support.tiny_tokenizer import write_tokenizer

UNREACHABLE = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWHCFSQDHRotPdtmYRoyA1zHivs92tCoRFk9Z7bHe7DRNj"
PROMPT = "Name a colour of the sky."
TOKEN_VARIABLE = "PETALS_TEST_TOKEN"


class Terminal:
    """Starts commands whose whole family of processes can be found again."""

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex
        self.environment = {**os.environ, TOKEN_VARIABLE: self.token}

    def start(self, *arguments: str, in_background: bool = False) -> "subprocess.Popen[str]":
        """``in_background``: as a shell starts a job that is followed by &, with SIGINT ignored."""
        shell = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh") if in_background else ()
        return subprocess.Popen(
            [*shell, sys.executable, "-m", "petals.cli", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.result(self.start(*arguments))

    def result(self, process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def family(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(TOKEN_VARIABLE) == self.token:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    for process in terminal.family():
        process.kill()


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """The lines of stderr up to the one that holds `text`."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} was never said:\n{seen}")


@pytest.mark.slow
def test_demo_answers_like_the_local_model_and_stops(
    terminal: Terminal, smollm2_path, smollm2_local, tokenizer
) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "12", "--dtype", "float32", "--keep")
    process = terminal.start("demo", *arguments, in_background=True)
    told = read_until(process, "Ctrl-C stops everything")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)

    chat = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.inference_mode():
        local = smollm2_local.generate(ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(local[0, ids.shape[1] :], skip_special_tokens=True)
    answer, *addresses = out.strip().split("\n/ip4/")
    assert answer == expected.strip()
    assert addresses
    assert all(f"{start}:{start + 10} at …" in told for start in (0, 10, 20))
    assert "first token after" in told
    assert process.returncode == 0
    assert terminal.family() == []


@pytest.mark.slow
def test_a_closed_swarm_serves_members_only(terminal: Terminal, tmp_path: Path) -> None:
    key, state_file = str(tmp_path / "lab.key"), tmp_path / "state.json"
    model = write_tiny_model(tmp_path / "tiny", "llama", num_hidden_layers=4)
    write_tokenizer(model)
    assert terminal.run("swarm", "new-key", key).returncode == 0
    swarm = terminal.start(
        *("swarm", "up", str(model), "--servers", "2", "--dtype", "float32"),
        *("--swarm-key", key, "--state-file", str(state_file)),
    )
    read_until(swarm, "Ctrl-C stops everything")
    state = json.loads(state_file.read_text())
    join = ("--join", state["initial_peers"][0])
    assert [server["blocks"] for server in state["servers"]] == [[0, 2], [2, 4]]
    assert all(psutil.pid_exists(server["pid"]) for server in state["servers"])

    ask = ("generate", str(model), *join, "--prompt", "one two", "--max-new-tokens", "3", "--json")
    started = [
        terminal.start("status", *join, "--swarm-key", key, "--json"),
        terminal.start(*ask, "--swarm-key", key),
        terminal.start(*ask),
    ]
    status, answer, refused = (terminal.result(process) for process in started)
    (model_map,) = json.loads(status.stdout)["models"]
    assert model_map["complete"]
    assert model_map["thinnest"]["num_servers"] == 1
    assert {s["peer_id"] for s in model_map["servers"]} == {s["peer_id"] for s in state["servers"]}
    told = json.loads(answer.stdout)
    assert told["num_new_tokens"] == 3
    assert [hop["blocks"] for hop in told["route"]] == [[0, 2], [2, 4]]
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "--swarm-key" in refused.stderr
    assert "Traceback" not in refused.stderr

    family = terminal.family()
    swarm.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == [], "servers must not outlive the process that started them"


def test_bootstrap_prints_addresses_and_leaves(terminal: Terminal, tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    process = terminal.start("bootstrap", "--host", "127.0.0.1", "--ready-file", str(ready))
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    read_until(process, "joined at")
    process.terminate()
    assert process.wait(30) == 0
    told = json.loads(ready.read_text())
    assert address in told["initial_peers"]
    assert address.endswith(told["peer_id"])
    assert terminal.family() == []


def test_wrong_options_are_told_apart_from_failures(terminal: Terminal, tmp_path: Path) -> None:
    join = ("--join", UNREACHABLE)
    endings = {
        ("status", *join): (1, "hint:"),
        ("generate", str(tmp_path / "nothing"), "--prompt", "x"): (2, "--join"),
        ("generate", "any", "--prompt", " ", *join): (2, "The prompt is empty."),
    }
    started = [terminal.start(*words) for words in endings]
    for process, (status, sentence) in zip(started, endings.values()):
        result = terminal.result(process)
        assert result.returncode == status
        assert result.stdout == ""
        assert sentence in result.stderr
        assert "Traceback" not in result.stderr
