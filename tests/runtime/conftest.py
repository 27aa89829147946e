import pathlib
import sys

import torch

# the plans that kernels are tried on serve the portable target as well
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "kernels"))
torch.set_num_threads(1)  # these products are small: threads cost more than they bring
