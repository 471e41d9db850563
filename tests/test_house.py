"""The rules of the house that a machine can check; CONTRIBUTING.md says why they are there."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import petals

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "petals"
MODULES = sorted(SRC.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 50
MAX_PARAMETERS = 6
MAX_MODULES = 12
OLD_ROOMS = "utils/"
"""Import paths of the original (docs/decisions/0014); modules there only name what is elsewhere."""
MAX_OLD_LINES = 50
FORBIDDEN_ROOMS = {"utils", "common", "helpers", "misc", "manager", "base", "core", "shared"}
BACKGROUND_ROOTS = {
    # The only places that catch everything: work started there has no caller who could.
    "swarm/rpc/dispatcher.py": 1,
    "server/compute/executor.py": 1,
    "swarm/background.py": 1,
}
LISTENS_TO_STRANGERS = ("wire/", "swarm/", "server/network/", "server/session/")
CODE_FROM_BYTES = {"eval", "exec", "compile"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def code_lines(function: Function) -> int:
    """Lines of a function without its decorators, signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def parameters(function: Function) -> list[ast.arg]:
    args = function.args
    listed = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    return [arg for arg in listed if arg.arg not in ("self", "cls")]


def is_command(path: Path) -> bool:
    """A command's parameters are the options that its user types."""
    return name_of(path).startswith("cli/commands/")


def test_there_is_a_house() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=name_of)
class TestModule:
    def test_size(self, path: Path) -> None:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES

    def test_opens_with_a_docstring(self, path: Path) -> None:
        assert ast.get_docstring(TREES[path]), "say what the module does and what it must not know"

    def test_has_a_room_with_a_name(self, path: Path) -> None:
        if name_of(path).startswith(OLD_ROOMS):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_OLD_LINES
            return
        assert not FORBIDDEN_ROOMS & set(path.relative_to(SRC).with_suffix("").parts)

    def test_functions_are_short(self, path: Path) -> None:
        long = [f.name for f in functions(TREES[path]) if code_lines(f) > MAX_FUNCTION_LINES]
        assert not long

    def test_parameters_are_few(self, path: Path) -> None:
        if is_command(path):
            return
        many = [f.name for f in functions(TREES[path]) if len(parameters(f)) > MAX_PARAMETERS]
        assert not many

    def test_signatures_are_typed(self, path: Path) -> None:
        untyped = [
            f"{function.name}({arg.arg})"
            for function in functions(TREES[path])
            for arg in parameters(function)
            if arg.annotation is None
        ]
        untyped += [
            f"{function.name} -> ?"
            for function in functions(TREES[path])
            if function.returns is None and function.name != "__init__"
        ]
        assert not untyped

    def test_catches_everything_only_at_task_roots(self, path: Path) -> None:
        broad = [
            node.lineno
            for node in ast.walk(TREES[path])
            if isinstance(node, ast.ExceptHandler) and catches_everything(node)
        ]
        assert len(broad) <= BACKGROUND_ROOTS.get(name_of(path), 0), f"lines {broad}"

    def test_peer_input_is_never_asserted(self, path: Path) -> None:
        if name_of(path).startswith(LISTENS_TO_STRANGERS):
            asserts = [n.lineno for n in ast.walk(TREES[path]) if isinstance(n, ast.Assert)]
            assert not asserts, f"raise a typed error instead, lines {asserts}"

    def test_bytes_never_become_code(self, path: Path) -> None:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Import):
                assert not UNPICKLERS & {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                unpickles = (node.module or "").split(".")[0] in UNPICKLERS
                assert not unpickles or {a.name for a in node.names} == {"UnpicklingError"}
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in CODE_FROM_BYTES | {"torch.load"}

    def test_resources_do_not_wait_for_the_collector(self, path: Path) -> None:
        assert "__del__" not in {function.name for function in functions(TREES[path])}

    def test_only_constants_reads_the_environment(self, path: Path) -> None:
        if name_of(path) == "constants.py":
            return
        reads = [
            node.lineno
            for node in ast.walk(TREES[path])
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("os.getenv", "os.environ.get", "getenv", "environ.get")
        ]
        assert not reads

    def test_nothing_is_left_for_later(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
        stubs = [
            node.lineno
            for node in ast.walk(TREES[path])
            if isinstance(node, ast.Raise)
            and node.exc is not None
            and ast.unparse(node.exc).startswith("NotImplementedError")
        ]
        assert not stubs


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_tools_are_written_like_the_product(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = functions(tree)
    assert ast.get_docstring(tree)
    assert all(code_lines(function) <= MAX_FUNCTION_LINES for function in found)
    assert all(len(parameters(function)) <= MAX_PARAMETERS for function in found)


def test_files_beside_the_product_are_short() -> None:
    for folder in ("benchmarks", "tools", "tests/chaos"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".c", ".h"):
                assert len(path.read_text("utf-8").splitlines()) <= MAX_FILE_LINES, path.name


def catches_everything(handler: ast.ExceptHandler) -> bool:
    """Whether the handler may swallow any error; putting things in order and raising is fine."""
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:
        return False
    if handler.type is None:
        return True
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(name) in ("Exception", "BaseException") for name in names)


def test_configs_are_frozen() -> None:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            is_checked = "Settings" in map(ast.unparse, node.bases)
            decorators = [d for d in map(ast.unparse, node.decorator_list) if "dataclass" in d]
            if is_checked or (node.name.endswith("Config") and decorators):
                assert any("frozen=True" in d for d in decorators), f"{name_of(path)}: {node.name}"


def test_unit_tests_do_not_sleep() -> None:
    sleepers = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "tests" / "unit").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("time.sleep", "asyncio.sleep")
        and ast.unparse(node.args[0]) != "0"
    ]
    assert not sleepers, "use a manual clock or an event"


def test_no_test_is_skipped() -> None:
    marks = re.compile(r"mark\.(skip|skipif|xfail|flaky)\b|pytest\.(skip|xfail)\(")
    for path in sorted((ROOT / "tests").rglob("*.py")):
        assert not marks.search(path.read_text(encoding="utf-8")) or path == Path(__file__)


def test_import_is_quick_and_without_torch() -> None:
    script = (
        # Seconds of this process, so that other work on the machine does not count.
        "import sys, time; began = time.process_time(); import petals; "
        "took = time.process_time() - began; "
        "heavy = {'torch', 'transformers', 'hivemind', 'numpy'} & set(sys.modules); "
        "print(took, sorted(heavy))"
    )
    took_seconds, heavy = min(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        .stdout.strip()
        .split(" ", 1)
        for _ in range(3)
    )
    assert heavy == "[]"
    assert float(took_seconds) < 0.3


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from petals.cli.main import app; "
        "assert not {'torch', 'transformers', 'hivemind'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_are_the_visible_ones() -> None:
    visible = [name for name in dir(petals) if not name.startswith("_")]
    assert sorted(visible) == sorted(petals.__all__)
    for name in petals.__all__:
        assert getattr(petals, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Distributed'"):
        _ = petals.Distributed


def test_version_is_the_newest_of_the_changelog() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == petals.__version__


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_the_repository_names_no_machine() -> None:
    private = re.compile("/(?:" + "|".join(("work", "farm", "root", "tmp")) + ")/[a-z]")
    for path in tracked_files():
        found = private.search(path.read_text(encoding="utf-8", errors="ignore"))
        assert found is None, f"{path.name}: {found}"


def test_documents_link_to_files_that_exist() -> None:
    link = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
    for page in (path for path in tracked_files() if path.suffix == ".md"):
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in link.findall(prose):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_the_architecture_names_files_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+(?:\.py)?)`", text)) | set(
        re.findall(r"`(\w+\.py)`", text)
    )
    assert len(named) > 20
    for name in named:
        assert (SRC / name).with_suffix(".py").is_file(), name


def test_a_folder_holds_few_modules() -> None:
    for folder in {path.parent for path in MODULES}:
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MAX_MODULES, f"{folder.name}: {len(modules)} modules"


def top_level_types(tree: ast.Module) -> Iterator[str]:
    """Classes, and type aliases: assignments to a name in CapWords."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", target.id):
                    yield target.id


def test_a_type_name_means_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    for path, tree in TREES.items():
        for name in top_level_types(tree):
            homes.setdefault(name.lstrip("_"), []).append(name_of(path))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}
