import torch

torch.set_num_threads(1)  # these products are small: threads cost more than they bring
