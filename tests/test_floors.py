"""The house: five floors, imports point down, and one file knows each foreign world."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["recsys", "features", "towers", "serving", "experiments"]
EXEMPT = {"recsys/__init__.py", "recsys/__main__.py"}
"""They hand out the public names and start the command."""
OWNERS = {
    "mlflow": "experiments/tracking/store.py",
    "hnswlib": "serving/index.py",
    "granian": "serving/api/server.py",
}
"""Foreign worlds that one file each knows."""
BENCHMARKS = "experiments/benchmarks/"
"""They measure us against the libraries themselves."""
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "tests"}


def sources() -> list[Path]:
    return sorted(file for floor in FLOORS for file in (ROOT / floor).rglob("*.py"))


def floor_of(module: str) -> str | None:
    """The floor of a dotted module; None: it is not ours."""
    parts = module.split(".")
    if parts[0] != "recsys":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "recsys"


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(text: str, package: str = "") -> Iterator[tuple[int, str]]:
    """Line and dotted module of every import, those inside functions and relative ones too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1])
                module = f"{base}.{module}".strip(".")
            yield node.lineno, module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function in ("importlib.import_module", "import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def of(file: Path) -> list[tuple[int, str]]:
    parts = file.relative_to(ROOT).parent.parts
    package = ".".join(parts if parts[0] == "recsys" else ("recsys", *parts))
    return list(imports(file.read_text(encoding="utf-8"), package))


def test_the_reader_of_imports_sees_every_kind() -> None:
    text = (
        "import os.path, recsys.serving.index as i\nfrom recsys.towers import blocks\n"
        "from . import a\nfrom ..serving import b\n"
        "def f():\n    from recsys.experiments.tracking import c\n"
        "if TYPE_CHECKING:\n    import mlflow\nimportlib.import_module('pickle')\n"
    )
    assert [module for _, module in sorted(imports(text, "recsys.features.readers"))] == [
        "os.path", "recsys.serving.index", "recsys.towers", "recsys.features.readers",
        "recsys.features.serving", "recsys.experiments.tracking", "mlflow", "pickle",
    ]  # fmt: skip


def test_there_are_five_floors_with_files() -> None:
    assert {name(file).split("/")[0] for file in sources()} == set(FLOORS)


def test_a_file_imports_only_its_own_floor_and_those_before_it() -> None:
    wrong = []
    for file in sources():
        floor = FLOORS.index(name(file).split("/")[0])
        if name(file) in EXEMPT:
            continue
        for line, module in of(file):
            other = floor_of(module)
            if other is not None and FLOORS.index(other) > floor:
                wrong.append(f"{name(file)}:{line} imports {module}, a floor above")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", list(OWNERS))
def test_one_file_knows_each_foreign_world(library: str) -> None:
    users = {
        name(file)
        for file in sources()
        if any(module.split(".")[0] == library for _, module in of(file))
        and not name(file).startswith(BENCHMARKS)
    }
    assert users <= {OWNERS[library]}


def test_nothing_is_pickled_and_tests_are_not_imported() -> None:
    wrong = [
        f"{name(file)}:{line} imports {module}"
        for file in sources()
        for line, module in of(file)
        if module.split(".")[0] in FORBIDDEN
    ]
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                loose = any(
                    word.arg == "allow_pickle" and ast.unparse(word.value) != "False"
                    for word in node.keywords
                )
                unsafe = call == "torch.load" and not any(
                    word.arg == "weights_only" and ast.unparse(word.value) == "True"
                    for word in node.keywords
                )
                if loose or unsafe:
                    wrong.append(f"{name(file)}:{node.lineno} {call} may unpickle")
    assert not wrong, "\n".join(wrong)


def test_only_the_exempt_import_upwards_and_then_lazily() -> None:
    """`import recsys` loads no other floor: the users of one room do not pay for the others."""
    for file in sorted(EXEMPT):
        path = ROOT / file
        if not path.exists():
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and file.endswith("__init__.py"):
                modules = [module for _, module in imports(ast.unparse(node), "recsys")]
                assert all(floor_of(module) in (None, "recsys") for module in modules)
