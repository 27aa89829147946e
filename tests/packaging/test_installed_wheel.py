"""The wheel in an environment of its own: the backend is found by name, and the command runs. No network is used."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

ROOT = pathlib.Path(__file__).parents[2]

USE = """
import torch
from torch.nn.functional import scaled_dot_product_attention

assert "effattn" in torch._dynamo.list_backends(), torch._dynamo.list_backends()

def causal(q, k, v):
    allowed = torch.ones(17, 17, dtype=torch.bool).tril()
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed)

q, k, v = torch.randn(3, 1, 2, 17, 16)
fast = torch.compile(causal, backend="effattn", options={"rest": "eager", "strict": True})
assert torch.allclose(fast(q, k, v), causal(q, k, v), atol=1e-5)

import effattn, pathlib, sys
assert pathlib.Path(effattn.__file__).is_relative_to(sys.prefix), effattn.__file__
assert {site.predicate for site in effattn.explain(causal, q, k, v).sites} == {"k <= q"}
for name in ("exact", "power", "window"):
    assert effattn.Policy.named(name).name == name
"""

# torch's builds for the CPU bring no Triton
WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # cannot be imported, nor be found by find_spec
import torch

def masked(q, k, v, there):
    allowed = torch.ones(17, 17, dtype=torch.bool).tril() & there[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

inputs = *torch.randn(3, 2, 2, 17, 16), torch.ones(2, 17, dtype=torch.bool)
fast = torch.compile(masked, backend="effattn", options={"rest": "eager", "strict": True, "verify": True})
assert torch.allclose(fast(*inputs), masked(*inputs), atol=1e-5)

import effattn

report = effattn.explain(masked, *inputs)
assert [site.kernel for site in report.sites] == ["portable (ATen, blockwise)"], report
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Folder of the programs of a new environment that holds the wheel; what it needs is read from where we run."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("installed")
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    programs = folder / "env" / "bin"
    python = str(programs / "python")
    install = ["install", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", str(wheel)]
    _run([sys.executable, "-m", "pip", "--python", python, *install], cwd=folder)
    (site,) = (folder / "env").glob("lib/python3*/site-packages")
    # a path in a .pth file comes after the environment's own packages, and .pth files found there are not read: the
    # source tree, installed for development, stays out
    outer = dict.fromkeys((sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]))
    (site / "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
    return programs


def _run(command, cwd, **variables) -> str:
    """What a command prints; a list, or a text for the shell."""
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**keep, **variables},
        shell=isinstance(command, str),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}: {result.stdout}\n{result.stderr}"
    return result.stdout


def test_backend_is_found_by_name(environment, tmp_path):
    _run([str(environment / "python"), "-c", USE], cwd=tmp_path)


def test_no_triton_is_needed(environment, tmp_path):
    _run([str(environment / "python"), "-c", WITHOUT_TRITON], cwd=tmp_path)


def test_the_commands_of_the_readme_install(environment, tmp_path):
    """As they stand there, in a checkout. pip is told not to ask a network, and to take hatchling from where we run."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Install\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    checkout = tmp_path / "effattn"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, _folder(checkout) / name)
    shutil.copytree(ROOT / "effattn", checkout / "effattn", ignore=shutil.ignore_patterns("__pycache__"))
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_IGNORE_INSTALLED": "1"}
    path = os.pathsep.join([str(environment), os.environ["PATH"]])
    for command in block.splitlines():
        _run(command, cwd=checkout, PATH=path, **offline)
    assert list((checkout / "dist").glob("effattn-*.whl"))
    where = _run([str(environment / "python"), "-c", "import effattn; print(effattn.__file__)"], cwd=tmp_path)
    assert pathlib.Path(where.strip()).is_relative_to(environment.parent)


def _folder(path):
    path.mkdir(exist_ok=True)
    return path


@pytest.mark.parametrize(
    ("command", "says"),
    [(["--version"], "effattn 0."), (["forms"], "power"), (["policy", "list"], "window"), (["cache"], "")],
    ids=str,
)
def test_command_runs(environment, tmp_path, command, says):
    said = _run([str(environment / "effattn"), *command], cwd=tmp_path, EFFATTN_CACHE_DIR=str(tmp_path / "cache"))
    assert says in said
