"""Generated kernels run on Triton's interpreter unless a GPU is asked for; nothing is written to the user's cache."""

import os
import tempfile

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
os.environ.setdefault("EFFATTN_CACHE_DIR", tempfile.mkdtemp(prefix="effattn-tests-"))
