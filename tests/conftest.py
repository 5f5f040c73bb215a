"""Let the tests import the project from wherever pytest is started, on one thread each: two that
wait for each other on a busy machine are ten times slower."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"             # of the processes that tests start
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch                                    # noqa: E402

torch.set_num_threads(1)
