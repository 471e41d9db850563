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
    with pytest.raises(ConfigError, match="device='cuda:x' is not allowed") as caught:
        ComputeConfig(device="cuda:x")
    assert "cuda:N" in caught.value.hint


def test_the_cache_is_given_once() -> None:
    with pytest.raises(ConfigError, match="Both cache_tokens and cache_bytes"):
        MemoryConfig(cache_tokens=64, cache_bytes=2**20)


def test_blocks_may_be_written_as_text() -> None:
    assert ServerConfig(source=SOURCE, blocks="3:7").blocks == BlockSpan(3, 7)


def test_it_is_light_enough_for_a_command_line() -> None:
    script = (
        "import sys; import petals.server.config; "
        "print(sorted({'torch', 'transformers', 'hivemind'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "[]"
