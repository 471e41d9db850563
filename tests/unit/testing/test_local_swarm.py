"""A swarm of processes reports what went wrong and leaves nothing behind."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from petals.errors import ConfigError, SwarmError
from petals.testing import local_swarm
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from petals.types import BlockSpan

PROGRAM = """
import json, pathlib, sys
arguments = sys.argv[1:]
command = arguments[0]
if command in {failing!r}:
    print("no room for", command)
    sys.exit(3)
ready = pathlib.Path(arguments[arguments.index("--ready-file") + 1])
content = {{"peer_id": "peer", "initial_peers": ["/address"], "blocks": [0, 2], "argv": arguments}}
draft = ready.with_suffix(".draft")
draft.write_text(json.dumps(content))
draft.rename(ready)
sys.stdin.read()
"""

CONFIG = LocalSwarmConfig(
    model="some/model",
    spans=(BlockSpan(0, 2), BlockSpan(2, 4)),
    dtype="float32",
    startup_timeout_seconds=20.0,
)


@pytest.fixture(autouse=True)
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request) -> None:
    """Let a few lines of Python stand in for the real commands, of which some fail."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(failing=getattr(request, "param", ())))
    monkeypatch.setattr(local_swarm, "COMMAND", (sys.executable, str(program)))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_starts_names_and_stops_all() -> None:
    stages: list[str] = []
    with LocalSwarm(CONFIG, say=stages.append) as swarm:
        state = json.loads(json.dumps(swarm.state()))
        pids = [server["pid"] for server in state["servers"]]
        assert state["initial_peers"] == ["/address"]
        assert [server["blocks"] for server in state["servers"]] == [[0, 2], [0, 2]]
        assert all(is_running(pid) for pid in pids)
        assert swarm.exited() == set()
        logs = swarm.servers[0].log.parent
        ready = swarm.servers[1].log.with_suffix(".json")
        arguments = " ".join(json.loads(ready.read_text())["argv"])
    assert "serve some/model --blocks 2:4 --dtype float32 --join /address" in arguments
    assert "--host 127.0.0.1" in arguments
    assert stages[-1] == "2 of 2 servers online"
    assert not any(is_running(pid) for pid in pids)
    assert not logs.exists()


@pytest.mark.parametrize("failing", [("serve",)], indirect=True)
def test_a_server_that_fails_is_quoted() -> None:
    swarm = LocalSwarm(CONFIG)
    with pytest.raises(SwarmError, match=r"(?s)server-1 ended with status 3.*no room for serve"):
        swarm.start()
    assert swarm.servers == []


def test_a_killed_server_is_noticed() -> None:
    with LocalSwarm(CONFIG) as swarm:
        os.kill(swarm.servers[0].pid, signal.SIGKILL)
        os.waitid(os.P_PID, swarm.servers[0].pid, os.WEXITED | os.WNOWAIT)
        assert swarm.exited() == {"server-1"}


def test_processes_ended_on_purpose_are_no_failures() -> None:
    with LocalSwarm(CONFIG) as swarm:
        killed, ended = swarm.servers
        swarm.kill(killed)
        swarm.end(ended)
        swarm.kill_bootstrap()
        assert not any(is_running(server.pid) for server in (killed, ended))
        assert (swarm.servers, swarm.processes, swarm.exited()) == ([], (), set())
        swarm.restart_bootstrap()
        assert [process.name for process in swarm.processes] == ["bootstrap-3"]


def test_one_more_server_can_join() -> None:
    with LocalSwarm(CONFIG) as swarm:
        (server,) = swarm.add_servers(BlockSpan(0, 2))
        assert is_running(server.pid)
        assert len(swarm.servers) == 3
        assert swarm.server(server.peer_id).blocks == BlockSpan(0, 2)
    assert not is_running(server.pid)


def test_a_swarm_without_servers_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one server"):
        LocalSwarm(LocalSwarmConfig(model="m", spans=())).start()
