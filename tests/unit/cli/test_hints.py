"""Hints name commands that exist, and flags that exist in the command at hand."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import petals
from petals import errors
from petals.cli import run_dht
from petals.cli.main import app
from petals.cli.run_server import KEPT
from petals.cli.terminal.server_flags import build_parser, spelling
from petals.cli.terminal.wording import FLAG, SENTENCE, respell_flags
from petals.server.config import ServerConfig
from petals.swarm.config import NodeConfig

SRC = Path(petals.__file__).parent
COMMAND = re.compile(r"\bpetals ((?:swarm|models) [a-z-]+|[a-z-]+)")
JOINING = ("serve", "bootstrap", "generate", "chat", "status")
PRINTERS = {
    # Which commands print the errors of a folder or file; the longest name counts.
    "": ("serve", "bootstrap", "generate", "chat", "status", "pull", "models plan", "demo"),
    "errors.py": JOINING,
    "swarm/": JOINING,
    "swarm/config.py": ("serve", "bootstrap"),
    "server/": ("serve",),
    "models/loading/quantize.py": ("serve",),
    "client/": ("generate", "chat"),
    "testing/": ("swarm up", "demo"),
    "demo/data.py": (),  # for examples, which have --data
    "cli/terminal/": ("generate", "chat"),
    "cli/terminal/server_flags.py": (),
    "cli/run_server.py": (),
    "cli/run_dht.py": (),
    "cli/commands/cache.py": ("rm",),
}


def options() -> dict[str, set[str]]:
    """Command -> its flags."""
    root = typer.main.get_command(app)
    found: dict[str, set[str]] = {}
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None) or {"": command}
        for below, each in inner.items():
            flags = [flag for param in each.params for flag in (*param.opts, *param.secondary_opts)]
            found[f"{name} {below}".strip()] = {*flags, "--help"}
    return found


OPTIONS = options()


def texts(node: ast.AST, constants: dict[str, ast.expr]) -> Iterator[str]:
    """The texts that an expression can be, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        yield "".join(map(str, parts))
    elif isinstance(node, ast.Name) and node.id in constants:
        yield from texts(constants[node.id], {})
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child, constants)


def hints_of(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assigned = [
        (target.id, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    constants = dict(assigned)
    for name, value in assigned:  # in errors.py each class has a default_hint
        if "hint" in name.lower() or "WITHOUT_INDEX" in name:
            yield from texts(value, {})
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "hint":
            yield from texts(node.value, constants)
        elif isinstance(node, ast.FunctionDef) and "hint" in node.name:
            yield from texts(node, constants)


HINTS = sorted(
    {
        (path.relative_to(SRC).as_posix(), hint)
        for path in SRC.rglob("*.py")
        for hint in hints_of(path)
        if "--" in hint or "petals " in hint
    }
)


def printers(file: str) -> tuple[str, ...]:
    longest = max((key for key in PRINTERS if file.startswith(key)), key=len)
    if not longest and file.startswith("cli/commands/"):
        own = Path(file).stem
        return tuple(name for name in OPTIONS if name.split()[0] == own)
    return PRINTERS[longest]


def test_there_are_hints() -> None:
    assert len(HINTS) > 30
    assert ("errors.py", errors.AdmissionDenied.default_hint) in HINTS


@pytest.mark.parametrize(("file", "hint"), HINTS)
def test_commands_and_flags_of_a_hint_exist(file: str, hint: str) -> None:
    for sentence in SENTENCE.split(hint):
        named = list(COMMAND.finditer(sentence))
        for command in named:
            assert command[1] in OPTIONS or command[1] in ("and", "on"), sentence
        for flag in FLAG.finditer(sentence):
            before = [command[1] for command in named if command.start() < flag.start()]
            where = before[-1:] or printers(file)
            assert all(flag[0] in OPTIONS[name] for name in where), f"{flag[0]}: {where}"


SERVED = [
    (file, hint)
    for file, hint in HINTS
    if {"serve", "bootstrap"} & {*printers(file)}
    and "--cache-memory" not in hint  # a conflict with an option that the original has not
]


@pytest.mark.parametrize(("file", "hint"), SERVED)
def test_commands_of_the_original_print_their_own_flags(file: str, hint: str) -> None:
    servers = set(re.findall(r"--[a-z_]+", build_parser().format_help()))
    told = respell_flags(hint, spelling(ServerConfig, KEPT))
    assert all(flag[0] in servers for flag in bare_flags(told)), told
    if "bootstrap" in printers(file):
        names = {name: name for name in run_dht._KEPT}
        peers = set(re.findall(r"--[a-z_]+", run_dht.build_parser().format_help()))
        told = respell_flags(hint, spelling(NodeConfig, names))
        assert all(flag[0] in peers for flag in bare_flags(told)), told


def bare_flags(hint: str) -> list[re.Match[str]]:
    return [
        flag
        for sentence in SENTENCE.split(hint)
        if not COMMAND.search(sentence)
        for flag in FLAG.finditer(sentence)
    ]


def test_flags_of_named_commands_are_left_alone() -> None:
    hint = "Use --swarm-key FILE. petals status --join ADDR shows who is there; or --join ADDR."
    names = {"--swarm-key": "--swarm_key", "--join": "--initial_peers"}
    told = respell_flags(hint, names)
    assert told.startswith("Use --swarm_key FILE. petals status --join ADDR shows")
    assert told.endswith("; or --initial_peers ADDR.")
