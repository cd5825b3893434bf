"""What is shipped: the wheel's and the source distribution's files, one version everywhere, and the built docs."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import featcal_kernels
import pytest
import yaml

import featcal_fast as ff
from featcal_fast import errors

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"featcal_fast": ROOT / "featcal_fast", "featcal_kernels": ROOT / "kernels" / "featcal_kernels"}
FOLDERS = ("featcal_fast", "kernels", "bench", "docs", "examples", "tests")
FILES = ("README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "SECURITY.md")
BUILD = "from setuptools import build_meta as backend; backend.build_wheel('dist'); backend.build_sdist('dist')"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with a wheel and a source distribution in `dist`, built without a network."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in (*FILES, "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy


def test_the_wheel_holds_the_packages_and_nothing_else(checkout: Path) -> None:
    (wheel,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    code = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in SOURCES.items()
        for path in [*folder.rglob("*.py"), *folder.rglob("*.json"), folder / "py.typed"]
    }
    assert {name for name in names if ".dist-info/" not in name} == code
    assert f"\nVersion: {ff.__version__}\n" in metadata


def test_the_source_distribution_holds_what_tests_need(checkout: Path) -> None:
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    folders = [checkout / name for name in FOLDERS]
    wanted = [checkout / name for name in FILES] + [path for folder in folders for path in folder.rglob("*.*")]
    assert {path.relative_to(checkout).as_posix() for path in wanted if path.is_file()} <= names


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## \[(\d.*?)\] - (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)
    assert releases[0] == (ff.__version__, str(citation["date-released"]))
    assert citation["version"] == ff.__version__


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The built page of the API; any warning fails, as of a page that the index does not name."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(out)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (out / "api.html").read_text()


def test_every_public_name_is_documented(api: str) -> None:
    anchors = set(re.findall(r'id="(?:module-)?(featcal_[\w.]+)"', api))
    subclasses = {f"featcal_fast.errors.{name}" for name, value in vars(errors).items() if inspect.isclass(value)}
    names = {f"featcal_fast.{name}" for name in ff.__all__ if name != "FeatCalError"}
    assert names | subclasses | {f"featcal_kernels.{name}" for name in featcal_kernels.__all__} <= anchors


def test_the_api_page_lists_every_public_name() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted([*ff.__all__, *featcal_kernels.__all__])
