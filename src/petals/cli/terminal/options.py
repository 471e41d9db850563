"""Options that several commands share, and what they mean when they are left out.

Knows the environment variables that stand in for options. Loads no torch and dials nobody.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals import constants
from petals.errors import ConfigError

if TYPE_CHECKING:
    from petals.swarm.membership import SwarmKey

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face repository or a local folder.")
]
Join = Annotated[
    list[str] | None,
    typer.Option(
        "--join",
        metavar="ADDR",
        help=f"A peer of the swarm; may be repeated. [env: {constants.ENV_INITIAL_PEERS}]",
    ),
]
SwarmKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--swarm-key",
        metavar="FILE",
        help=f"Key file of a closed swarm. [env: {constants.ENV_SWARM_KEY}]",
    ),
]
Dtype = Annotated[
    str, typer.Option(metavar="DTYPE", help="auto, float32, bfloat16 or float16 (also int8).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")]
Host = Annotated[str, typer.Option(metavar="IP", help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="0: any free port.")]
Announce = Annotated[
    list[str] | None,
    typer.Option(
        "--announce",
        metavar="ADDR",
        help="Multiaddress at which others reach us, if it differs; may be repeated.",
    ),
]
Relay = Annotated[
    bool | None,
    typer.Option(
        "--relay/--no-relay",
        help="Be reached through other members, always or never; by default if others cannot dial.",
    ),
]
IdentityFile = Annotated[
    Path | None,
    typer.Option("--identity", metavar="FILE", help="Private key that keeps the peer id the same."),
]
ReadyFile = Annotated[
    Path | None,
    typer.Option("--ready-file", metavar="FILE", help="Write this JSON file when online."),
]
UntilStdinCloses = Annotated[
    bool, typer.Option("--until-stdin-closes", help="Stop when standard input ends.")
]


def peers_to_join(join: list[str] | None) -> tuple[str, ...]:
    """The addresses typed, or those of PETALS_INITIAL_PEERS. Raises ConfigError without any."""
    addresses = tuple(join or ()) or constants.initial_peers()
    if not addresses:
        raise ConfigError(
            "No swarm was named, and there is no public swarm to fall back to.",
            hint=f"Add --join ADDR (or set {constants.ENV_INITIAL_PEERS}); "
            "petals swarm up starts a swarm on this machine.",
        )
    return addresses


def read_swarm_key(file: Path | None) -> "SwarmKey | None":
    """The key in `--swarm-key` or PETALS_SWARM_KEY; None for an open swarm. Raises ConfigError."""
    from petals.swarm.identity import load_swarm_key

    file = file or constants.swarm_key_file()
    return None if file is None else load_swarm_key(file)
