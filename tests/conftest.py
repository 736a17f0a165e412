"""Nothing in the suite asks the Hub, every test is seeded, and tiny models run quickly."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import set_seed

# Models of a hundred weights spend their time in waiting for a second thread.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Each `train()` begins with a full garbage collection: spare it what imports have left.

    By now all of the suite's files are imported, with the libraries that some of them alone need,
    which takes the collector 0.15 s; there are some thousands of trainings.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    set_seed(0)
