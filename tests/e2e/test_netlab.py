"""A laboratory is what it is set to; where it cannot run, it says what is missing."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from netlab import Host, NetLab, NetLabError, Topology, processes

ECHO = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", 7000))
print("listening", flush=True)
while True:
    data, peer = server.recvfrom(2000)
    server.sendto(peer[0].encode().ljust(len(data)), peer)
"""
PING = """
import json, select, socket, sys, time
host, count, size, pause = sys.argv[1], *map(float, sys.argv[2:])
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
rtts, seen, began = [], "", time.monotonic()
for _ in range(int(count)):
    sent = time.monotonic()
    link.sendto(bytes(int(size)), (host, 7000))
    while select.select([link], [], [], pause)[0]:
        seen = link.recv(2000).decode().strip()
        rtts.append(1e3 * (time.monotonic() - sent))
print(json.dumps({"rtts": rtts, "seen": seen, "seconds": time.monotonic() - began}))
"""
TOPOLOGY = Topology(
    (Host("one"), Host("two"), Host("slow", up="1mbit"), Host("home", nat="restricted")), rtt_ms=20
)
OWNER = """
import sys
from netlab import Host, NetLab, Topology
with NetLab(Topology((Host("one"), Host("two"))), "orphan"):
    print("up", flush=True)
    sys.stdin.read()
"""


def ping(
    lab: NetLab, source: str, target: str, count: int = 5, size: int = 50, pause: float = 0.1
) -> dict:
    words = [sys.executable, "-c", PING, lab.ip(target), str(count), str(size), str(pause)]
    ended = lab.run(source, words, capture_output=True, text=True, check=True)
    return json.loads(ended.stdout)


def test_a_laboratory_is_what_it_is_set_to() -> None:
    if processes.missing():
        with pytest.raises(NetLabError, match="A laboratory needs"):
            NetLab(TOPOLOGY).__enter__()
        return
    with NetLab(TOPOLOGY) as lab:
        for host in ("two", "home"):
            server = lab.popen(host, [sys.executable, "-c", ECHO], stdout=subprocess.PIPE)
            assert server.stdout is not None and server.stdout.readline() == b"listening\n"
        # The fastest of some round trips does not depend on what else the machine does.
        assert 19.8 <= min(ping(lab, "one", "two")["rtts"]) <= 22
        lab.set_link("one", "two", rtt_ms=60)
        assert 59.8 <= min(ping(lab, "one", "two")["rtts"]) <= 62
        lab.set_link("two", "one", one_way=True, down=True)
        assert ping(lab, "one", "two")["rtts"] == []
        lab.heal()
        assert 19.8 <= min(ping(lab, "one", "two")["rtts"]) <= 22
        # 1000 bytes, IP and Ethernet headers at 1 Mbit/s: 8.5 ms more.
        assert 28 <= min(ping(lab, "slow", "two", size=1000)["rtts"]) <= 31
        lab.set_host("one", loss=0.5)
        num_back = len(ping(lab, "one", "two", count=200, pause=0.002)["rtts"])
        assert 25 <= num_back <= 75, "a quarter comes back"
        lab.heal()
        lab.unplug("two")
        assert ping(lab, "one", "two")["rtts"] == []
        lab.heal()
        # Who is behind a router is seen at its address, and reached only by answers.
        assert ping(lab, "home", "two")["seen"] == lab.ip("home")
        assert ping(lab, "one", "home")["rtts"] == []
        assert NetLab.attach(lab.name).hosts == ["one", "two", "slow", "home"]
        assert lab.stats()["deliveries"] > 100
    assert server.wait(5) < 0
    with pytest.raises(NetLabError, match="running"):
        NetLab.attach(lab.name)


def test_a_laboratory_ends_with_its_owner() -> None:
    if processes.missing():
        return
    tools = str(Path(processes.__file__).parents[1])
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env={"PYTHONPATH": tools, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    forwarder = psutil.Process(processes.labs()["orphan"]["forwarder"][0])
    owner.kill()
    owner.wait()
    assert forwarder.wait(10) is None
    deadline = time.monotonic() + 10
    while "orphan" in processes.labs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "orphan" not in processes.labs()
