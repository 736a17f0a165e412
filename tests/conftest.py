"""Nothing in the suite asks the Hub, and every test is seeded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import set_seed


@pytest.fixture(autouse=True)
def _seeded():
    set_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
