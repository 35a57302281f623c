"""What is packed; and what other tools read a second time: the recipe for conda and the table of wheels."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
# Names that conda-forge gives the packages of PyPI.
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
# What chooses a dependency: in pyproject.toml, and in the recipe.
SELECTORS = {"sys_platform == 'linux'": "linux", "python_version < '3.11'": 'match(python, "<3.11")'}


@pytest.fixture(scope="module")
def recipe() -> Any:
    """The recipe, with the values of its context in place."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "scripts" / "conda" / "recipe.yaml").read_text(encoding="utf-8")
    for name, value in yaml.safe_load(text)["context"].items():
        text = text.replace(f"${{{{ {name} }}}}", value)
    return yaml.safe_load(text)


def in_conda(requirement: str) -> tuple[str, str | None]:
    """``torch>=2.10; marker`` as ``("pytorch >=2.10", selector)``."""
    specifier, _, marker = requirement.partition(";")
    name, bound = re.fullmatch(r"([\w-]+)(.*)", specifier.strip()).groups()
    return f"{CONDA_NAMES.get(name, name)} {bound}".strip(), SELECTORS[marker.strip()] if marker else None


def entries(section: list[Any]) -> set[tuple[str, str | None]]:
    return {(entry["then"], entry["if"]) if isinstance(entry, dict) else (entry, None) for entry in section}


def test_the_recipe_names_the_project(recipe: Any) -> None:
    assert recipe["package"] == {"name": PROJECT["name"], "version": PROJECT["version"]}
    about = recipe["about"]
    assert (about["summary"], about["license"]) == (PROJECT["description"], PROJECT["license"])
    assert [about["license_file"]] == PROJECT["license-files"]
    scripts = [f"{name} = {place}" for name, place in PROJECT["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == scripts


def test_the_recipe_has_the_dependencies_of_the_project(recipe: Any) -> None:
    assert entries(recipe["requirements"]["run"]) == {("python", None), *map(in_conda, PROJECT["dependencies"])}


def test_the_recipe_builds_with_what_the_project_builds_with(recipe: Any) -> None:
    tools = recipe["requirements"]
    found = {entry for entry in tools["build"] + tools["host"] if not entry.startswith("${{")} - {"python", "pip"}
    assert found == {in_conda(requirement)[0] for requirement in PYPROJECT["build-system"]["requires"]}


def test_wheels_are_built_for_the_pythons_that_are_tested() -> None:
    """Those of scripts/matrix.sh, and the one of mypy, which is the default; the oldest is the bound."""
    matrix = re.search(r"^\(\(\$#\)\) \|\| combinations=\((.*)\)$", (ROOT / "scripts/matrix.sh").read_text(), re.M)[1]
    tested = {*re.findall(r"(3\.\d+):", matrix), PYPROJECT["tool"]["mypy"]["python_version"]}
    wheels = PYPROJECT["tool"]["cibuildwheel"]["build"]
    assert {re.fullmatch(r"cp3(\d+)-\*", name)[1] for name in wheels} == {version[2:] for version in tested}
    assert PROJECT["requires-python"] == f">={min(tested, key=lambda version: int(version[2:]))}"


def test_every_package_of_the_tree_is_packed() -> None:
    """An editable install finds folders that a wheel leaves out."""
    setuptools = PYPROJECT["tool"]["setuptools"]
    places = {"lipgan": "lipgan", **setuptools["package-dir"]}
    packed = {places.get(name) or name.replace(".", "/") for name in setuptools["packages"]}
    there = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("lipgan", "kernels")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert packed == there
