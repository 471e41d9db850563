"""Expands a page's markers, and carries links from the repository's folders over to the site.

Marker lines are ``<!-- petals: NAME -->`` for a generated part and ``<!-- include: FILE -->`` for a
file of the repository. Links are written for readers of the repository; where the file they name
has a page of its own on the site, they lead to that page.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from petals_docs import commands, environment, errors, loading, messages, services, settings

PARTS: dict[str, Callable[[], str]] = {
    "commands": commands.render,
    "config": settings.render,
    "environment": environment.render,
    "errors": errors.render,
    "loading": loading.render,
    "messages": messages.render,
    "services": services.render,
}
INCLUDED_IN = {
    "ARCHITECTURE.md": "contributing/architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "README.md": "index.md",
    "SECURITY.md": "contributing/security.md",
    "benchmarks/METHODOLOGY.md": "performance/methodology.md",
    "tools/netlab/README.md": "contributing/netlab.md",
}
"""Files outside ``docs`` -> the pages that show them."""

RESULTS, RESULT_PAGES = "benchmarks/results", "performance/measured"

_PART = re.compile(r"^<!-- petals: (\w+) -->$", re.MULTILINE)
_FILE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
_FENCED_OR_LINK = re.compile(
    r"^```.*?^```$|`[^`\n]*`|\[(?P<text>[^]]*)\]\((?!https?:|mailto:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Repository:
    """``root`` of the repository and the folder ``docs`` of the site's sources in it."""

    root: Path
    docs: Path

    def expand(self, text: str, page: Path) -> str:
        """A page's text with every marker and link of it replaced."""
        text = self.relink(text, page, page)
        text = _PART.sub(lambda marker: PARTS[marker[1]](), text)
        return _FILE.sub(lambda marker: self._included(page, marker[1]), text)

    def relink(self, text: str, source: Path, page: Path) -> str:
        """Links written in ``source``, as they must be written in ``page``.

        A link to a folder becomes its text: the site shows pages and files.
        """

        def replace(found: re.Match[str]) -> str:
            if found["target"] is None:
                return found[0]
            path = Path(os.path.normpath(source.parent / found["target"]))
            if path.is_dir():
                return found["text"]
            relative = os.path.relpath(self._page_of(path), page.parent)
            return f"[{found['text']}]({relative}{found['anchor'] or ''})"

        return _FENCED_OR_LINK.sub(replace, text)

    def results(self) -> dict[Path, Path]:
        """Every file of results -> the page that shows it."""
        files = sorted((self.root / RESULTS).glob("*.md"))
        return {file: self.docs / RESULT_PAGES / file.name for file in files}

    def _page_of(self, path: Path) -> Path:
        if not path.is_relative_to(self.root):
            return path
        name = path.relative_to(self.root).as_posix()
        if name in INCLUDED_IN:
            return self.docs / INCLUDED_IN[name]
        return self.results().get(path, path)

    def _included(self, page: Path, name: str) -> str:
        file = Path(os.path.normpath(page.parent / name))
        return self.relink(file.read_text(encoding="utf-8"), file, page)


def write_result_pages(repository: Repository) -> None:
    """Sphinx shows files only: make one, ignored by git, for each file of results."""
    for file, page in repository.results().items():
        page.parent.mkdir(exist_ok=True)
        source = os.path.relpath(file, page.parent)
        page.write_text(f"---\norphan: true\n---\n<!-- include: {source} -->\n", encoding="utf-8")
