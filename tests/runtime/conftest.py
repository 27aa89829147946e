import pytest
import torch

from effattn.runtime.targets.portable import flash, shares, strips, tilings

torch.set_num_threads(1)  # these products are small: threads cost more than they bring


@pytest.fixture
def small_strips(monkeypatch):
    """Calls of any size go through the CPU flash kernel as long ones do."""
    monkeypatch.setattr(flash, "LEAST_PAIRS", 0)
    monkeypatch.setattr(strips, "ALONE", 8)
    monkeypatch.setattr(shares, "HEIGHTS", (16,))
    monkeypatch.setattr(tilings, "BLOCK", 8)
    shares._plan_once.cache_clear()
