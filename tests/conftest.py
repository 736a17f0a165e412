"""Nothing in the suite asks the Hub, every test is seeded, and tiny models run quickly."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers.trainer  # noqa: F401 - so that what it loads is frozen below
from transformers import set_seed

# Models of a hundred weights spend their time in waiting for a second thread.
torch.set_num_threads(1)
# Each `train()` begins with a full garbage collection: spare it the 0.3 s over what imports left.
gc.collect()
gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    set_seed(0)
