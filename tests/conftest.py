"""Generated kernels run on Triton's interpreter unless a GPU is asked for; Triton reads this when it is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
