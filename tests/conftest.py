"""Each test process computes on one thread: pytest runs several, and threads that share cores wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
