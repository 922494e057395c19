"""The wheel: one installed name, beside a project whose own packages are called like our floors."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FLOORS = ("features", "towers", "serving", "experiments")


def run(*command: str | Path, cwd: Path, python: Path | None = None) -> str:
    """Stdout of a command; its stderr is shown where it ends with another code than 0."""
    # Neither the checkout nor the environment of the tests may stand in for what is installed.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(part) for part in command]
    if python is not None:
        arguments.insert(0, str(python))
    done = subprocess.run(
        arguments, cwd=cwd, env=clean, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def copy_of_the_sources(folder: Path) -> Path:
    """The tracked and the new files, without what building leaves behind in a checkout."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in listed.splitlines():
        source, target = ROOT / name, folder / name
        if source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(source))
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a source distribution as installers do that find no wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = copy_of_the_sources(folder / "sources")
    backend = (
        "import sys; from setuptools import build_meta as backend; "
        "print(backend.build_sdist(sys.argv[1]))"
    )
    run("-c", backend, folder, cwd=sources, python=Path(sys.executable))
    (sdist,) = folder.glob("recsys-*.tar.gz")
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, sdist, cwd=folder, python=Path(sys.executable))
    (built,) = folder.glob("recsys-*.whl")
    return built


@pytest.fixture(scope="module")
def project(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A user's project with packages of the floors' names, and the Python of its environment."""
    folder = tmp_path_factory.mktemp("project")
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # What we depend on is taken from the environment of the tests, behind what is installed here.
    (site / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    for name in FLOORS:
        package = folder / name
        package.mkdir()
        (package / "__init__.py").write_text(f'WHOSE = "the user\'s {name}"\n')
    return folder, python


def test_nothing_but_recsys_is_installed_and_it_is_whole(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"recsys"}
    for name in (
        "recsys/py.typed",
        "recsys/features/readers/read.py",
        "recsys/towers/two_tower.py",
        "recsys/serving/recommender.py",
        "recsys/serving/api/page/index.html",
        "recsys/experiments/recipes/beauty.toml",
    ):
        assert name in names
    packed = {name for name in names if name.endswith(".py")}
    tracked = {
        f"recsys/{name.removeprefix('recsys/')}"
        for floor in ("recsys", *FLOORS)
        for name in run("git", "ls-files", floor, cwd=ROOT).splitlines()
        if name.endswith(".py") and "/benchmarks/" not in name and (ROOT / name).is_file()
    }
    assert tracked <= packed
    assert not [name for name in names if "benchmarks" in name or name.startswith("recsys/tests")]


def test_a_project_with_packages_of_the_same_names_keeps_its_own(
    project: tuple[Path, Path],
) -> None:
    folder, python = project
    code = (
        "import features, towers, serving, experiments, recsys\n"
        "from recsys import Recommender, RunConfig, TwoTower, train\n"
        "print(features.WHOSE, serving.WHOSE, sep=', ')\n"
        "print(recsys.__file__)\n"
        "print(Recommender.__module__)\n"
    )
    whose, file, module = run("-c", code, cwd=folder, python=python).splitlines()
    assert whose == "the user's features, the user's serving"
    assert Path(file).is_relative_to(folder / "environment")
    assert module == "recsys.serving.recommender"


def test_the_command_runs_in_such_a_project(project: tuple[Path, Path]) -> None:
    folder, python = project
    assert "recsys init" in run("-m", "recsys", "--help", cwd=folder, python=python)
    log = folder / "clicks.csv"
    rows = [f"u{n % 7},i{n % 11},{1_700_000_000 + n * 3600}" for n in range(77)]
    log.write_text("\n".join(["user,item,time", *rows]) + "\n")
    run("-m", "recsys", "init", log, "--out", folder / "run.toml", cwd=folder, python=python)
    prepared = run(
        "-m", "recsys", "prepare", folder / "run.toml", "--set", f"out={folder}/runs", "--json",
        cwd=folder, python=python,
    )  # fmt: skip
    assert '"path"' in prepared
