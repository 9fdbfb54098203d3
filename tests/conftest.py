"""What every test process is like: one thread to compute on, and children that collect no garbage of their parent's."""

import gc
import os

# Before anything imports torch. Pytest runs several processes, and threads that share cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if hasattr(os, "register_at_fork"):
    # A child that freed a video decoder of an earlier test would wait for threads that it does not have.
    os.register_at_fork(after_in_child=gc.disable)
