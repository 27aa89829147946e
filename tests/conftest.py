"""What all tests share: Triton's interpreter, unless a GPU is asked for; nothing is written to the user's cache."""

import os
import pathlib
import tempfile

import pytest
from hypothesis import settings

# the same examples in every run of CI, so that a change is judged by itself; others each time elsewhere
settings.register_profile("default", deadline=None)
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))

GPU_TESTS = pathlib.Path(__file__).parent / "gpu"

os.environ.setdefault("EFFATTN_CACHE_DIR", tempfile.mkdtemp(prefix="effattn-tests-"))


def pytest_configure(config: pytest.Config) -> None:
    """Kernels are interpreted, on the CPU, in every run but one of ``tests/gpu`` alone.

    One process can do one of the two: Triton looks at the variable when a kernel is defined. Processes that share the
    work (pytest-xdist) get it with the environment.
    """
    os.environ.setdefault("TRITON_INTERPRET", "0" if only_gpu_tests(config) else "1")


def only_gpu_tests(config: pytest.Config) -> bool:
    paths = [(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args]
    return all(path == GPU_TESTS or GPU_TESTS in path.parents for path in paths)
