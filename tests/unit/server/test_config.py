import subprocess
import sys

import pytest

from petals.errors import ConfigError
from petals.server.config import (
    AnnounceConfig,
    ComputeConfig,
    MemoryConfig,
    ServerConfig,
    SourceConfig,
)
from petals.types import BlockSpan

SOURCE = SourceConfig(model="m")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ComputeConfig, {"device": "tpu"}),
        (ComputeConfig, {"dtype": "float8"}),
        (ComputeConfig, {"quant": "int3"}),
        (ComputeConfig, {"num_threads": 0}),
        (MemoryConfig, {"cache_tokens": 0}),
        (MemoryConfig, {"cache_bytes": -1}),
        (AnnounceConfig, {"period_seconds": 60.0, "expiry_seconds": 60.0}),
        (ServerConfig, {"source": SOURCE, "num_blocks": 0}),
        (ServerConfig, {"source": SOURCE, "num_blocks": 2, "blocks": BlockSpan(0, 2)}),
    ],
)
def test_nonsense_is_refused_with_a_hint(kind: type, fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**fields)
    assert caught.value.hint


def test_a_gpu_may_be_numbered() -> None:
    assert ComputeConfig(device="cuda:1").device == "cuda:1"


def test_it_is_light_enough_for_a_command_line() -> None:
    script = (
        "import sys; import petals.server.config; "
        "print(sorted({'torch', 'transformers', 'hivemind'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "[]"
