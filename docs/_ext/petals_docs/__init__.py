"""Sphinx extension that writes the reference pages from the code when the site is built.

A page holds its prose and, alone on a line, markers such as ``<!-- petals: errors -->``. While
Sphinx reads the page each marker is replaced by Markdown made from the package. Nothing generated
is kept in the repository, so nothing there can be out of date.
"""

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

from petals_docs.pages import Repository, write_result_pages


def setup(app: Sphinx) -> ExtensionMetadata:
    """Called by Sphinx when it loads the extension."""
    docs = Path(app.srcdir)
    repository = Repository(docs.parent, docs)

    def expand(app: Sphinx, docname: str, source: list[str]) -> None:
        page = Path(app.env.doc2path(docname))
        source[0] = repository.expand(source[0], page)

    app.connect("builder-inited", lambda app: write_result_pages(repository))
    app.connect("source-read", expand)
    return {"version": "1", "parallel_read_safe": True}
