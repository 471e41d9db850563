"""The systemd unit that the guide shows."""

import configparser
import re
from pathlib import Path

GUIDE = Path(__file__).parents[3] / "docs/guides/serve.md"


def test_systemd_ends_the_server_first_and_the_rest_afterwards() -> None:
    """With its default, control-group, the network daemon would get SIGTERM at the same time."""
    (unit,) = re.findall(r"```ini\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    parser = configparser.ConfigParser()
    parser.read_string(unit)
    service = parser["Service"]
    assert service["KillMode"] == "mixed"
    assert float(service["TimeoutStopSec"]) > 60.0, "the default of --drain-seconds"
    assert service["ExecStart"].split()[1] == "serve"
