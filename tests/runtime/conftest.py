import pytest
import torch
from small_strips import small_strips as with_small_strips

torch.set_num_threads(1)  # these products are small: threads cost more than they bring


@pytest.fixture
def small_strips():
    with with_small_strips():
        yield
