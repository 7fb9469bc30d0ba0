"""The wheel holds what is needed to run, and nothing else. Building it needs no network."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import neuronledger

ROOT = Path(neuronledger.__file__).parent
PACKAGES = ("governance", "algorithms", "registry", "migrations")
MODULES = ("cli.py", "neuronledger.py")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources so that nothing is left in the project."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", *MODULES, *PACKAGES, "tests", "benchmarks", "docs"):
        if (ROOT / name).exists():
            _copy(ROOT / name, sources / name)
    subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd=sources, check=True, capture_output=True)
    return zipfile.ZipFile(next(built.glob("*.whl")))


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        return
    for path in source.iterdir():
        if path.name != "__pycache__" and not path.name.startswith("."):
            _copy(path, target / path.name)


def _sources(package: str) -> set[str]:
    """Every file of a package in the project."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile, package: str) -> None:
    expected = _sources(package)
    assert f"{package}/__init__.py" in expected
    assert expected <= set(wheel.namelist())


def test_the_wheel_holds_the_command_and_the_migrations(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {*MODULES, "migrations/env.py", "migrations/script.py.mako"} <= names
    assert any(name.startswith("migrations/versions/v0001") for name in names)
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "neuronledger = cli:main" in wheel.read(entry).decode()


def test_the_wheel_holds_the_templates(wheel: zipfile.ZipFile) -> None:
    templates = {name for name in _sources("governance") if "/templates/" in name}
    assert templates
    assert templates <= set(wheel.namelist())


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    information = {name for name in tops if name.endswith(".dist-info")}
    assert len(information) == 1
    assert tops - information == {*PACKAGES, *MODULES}


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    fields = wheel.read(name).decode().splitlines()
    assert "Name: neuronledger" in fields
    assert f"Version: {neuronledger.__version__}" in fields
    assert "License-Expression: Apache-2.0" in fields


def test_the_wheel_runs_by_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked elsewhere, it makes a registry: the migrations and their template are found there."""
    wheel.extractall(tmp_path / "installed")
    program = "import cli; cli.main(['init', '--database', 'sqlite:///registry.db'])"
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); {program}"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "registry.db").is_file()
