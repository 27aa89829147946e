"""The wheel holds all that is not Python, and works from where it is unpacked."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_every_file_of_the_package_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("effattn/")}
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "effattn").rglob("*")
        if path.suffix in (".py", ".toml", ".jinja", ".typed")
    }
    assert there <= packed
    assert {"effattn/py.typed", "effattn/policies/power.toml", "effattn/compiler/report/report.html.jinja"} <= packed


def test_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    assert "[console_scripts]\neffattn = effattn.cli.main:app" in text
    assert "[torch_dynamo_backends]\neffattn = effattn.compiler.backend:effattn" in text


SCRIPT = """
import pathlib, sys, effattn
from effattn.compiler.report.html import render
from effattn.policy import Policy
assert pathlib.Path(effattn.__file__).is_relative_to(sys.path[1]), effattn.__file__
assert Policy.named("power").rules
assert "effattn report" in render({})
from effattn.cli.main import app
app(["policy", "list"])
"""


def test_it_works_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in ("exact", "power", "window"))
