"""Pages of the site: markers are replaced, and links lead where they led in the repository."""

import re
from pathlib import Path

import pytest

import petals
from petals_docs.pages import INCLUDED_IN, PARTS, Repository, write_result_pages

ROOT = Path(__file__).parents[3]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    docs = tmp_path / "docs"
    for folder in ("docs/guides", "docs/performance", "docs/contributing", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "benchmarks/results/ring.md").write_text("# Ring\n")
    (tmp_path / "ARCHITECTURE.md").write_text("# A\n[faults](docs/guides/x.md#a) `[b](c)`\n")
    (tmp_path / "script.py").touch()
    return Repository(tmp_path, docs)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](other.md#part)", "[a](other.md#part)"),
        ("[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("[a](#part)", "[a](#part)"),
        ("[a](../../ARCHITECTURE.md#part)", "[a](../contributing/architecture.md#part)"),
        ("[a](../../benchmarks/results/ring.md)", "[a](../performance/measured/ring.md)"),
        ("[a](../../script.py)", "[a](../../script.py)"),
        ("[a](../../benchmarks)", "a"),
        ("`[a](../../benchmarks)`", "`[a](../../benchmarks)`"),
        ("```\n[a](../../benchmarks)\n```", "```\n[a](../../benchmarks)\n```"),
    ],
)
def test_links(repository: Repository, written: str, shown: str) -> None:
    page = repository.docs / "guides" / "page.md"
    assert repository.expand(written, page) == shown


def test_an_included_file_keeps_its_links(repository: Repository) -> None:
    page = repository.docs / "contributing" / "architecture.md"
    text = repository.expand("<!-- include: ../../ARCHITECTURE.md -->", page)
    assert text == "# A\n[faults](../guides/x.md#a) `[b](c)`\n"


def test_a_part_replaces_its_marker(repository: Repository) -> None:
    page = repository.docs / "page.md"
    text = repository.expand("Before.\n\n<!-- petals: services -->\n\nAfter.", page)
    assert text == f"Before.\n\n{PARTS['services']()}\n\nAfter."


def test_each_file_of_results_gets_a_page(repository: Repository) -> None:
    write_result_pages(repository)
    page = repository.docs / "performance" / "measured" / "ring.md"
    assert repository.expand(page.read_text(), page).endswith("# Ring\n\n")


def test_what_is_included_exists() -> None:
    for name, page in INCLUDED_IN.items():
        assert (ROOT / name).is_file() and (ROOT / "docs" / page).is_file()


def test_every_part_is_used_on_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert all(f"<!-- petals: {name} -->" in pages for name in PARTS)


def test_make_targets_in_pages_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    for page in pages:
        code = re.findall(r"```.*?```|`[^`]*`", page.read_text(encoding="utf-8"), re.DOTALL)
        named = set(re.findall(r"\bmake ([\w-]+)", "\n".join(code)))
        assert named <= targets, f"{page.name}: {named - targets}"


def test_tests_named_by_the_list_of_faults_exist() -> None:
    text = (ROOT / "docs" / "reference" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)*test_\w+)`(?:: ([\w, ]+?))?(?=[,;] `|;| \||, \[)", text)
    assert len(named) > 30
    for name, scenes in named:
        folder = ROOT / "tests" if "/" in name else ROOT / "tests" / "swarm"
        tests = (folder / f"{name}.py").read_text(encoding="utf-8").replace("_", " ")
        for scene in filter(None, scenes.split(", ")):
            assert scene in tests, f"{name} has no test of: {scene}"


def test_every_public_name_is_in_the_api_reference() -> None:
    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    families = {name for name in petals.__all__ if re.match("Distributed[A-Z]", name)}
    missing = [name for name in petals.__all__ if f"petals.{name}" not in text]
    assert set(missing) <= families
