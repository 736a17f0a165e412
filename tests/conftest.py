"""Nothing in the suite asks the Hub, every test is seeded, and tiny models run quickly."""

import functools
import gc
import os
from collections.abc import Generator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import yaml
from accelerate.utils import imports
from slow import RUN_SLOW, WITHOUT_SLOW, is_slow
from tiny import HAS_SAMPLING
from torch.utils.data import SequentialSampler
from transformers import Trainer, set_seed

if not HAS_SAMPLING:  # transformers < 5.2
    Trainer._get_train_sampler = lambda self, dataset=None: SequentialSampler(
        self.train_dataset if dataset is None else dataset
    )

make_optimizer = Trainer.get_optimizer_cls_and_kwargs


def with_options(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
    """Give SGD its `optim_args`, which older Trainers (5.5 among them) do not."""
    kind, options = make_optimizer(args, model)
    if kind is torch.optim.SGD and args.optim_args:
        pairs = (pair.split("=") for pair in args.optim_args.split(","))
        options = {key.strip(): yaml.safe_load(value) for key, value in pairs} | options
    return kind, options


Trainer.get_optimizer_cls_and_kwargs = staticmethod(with_options)

# Models of a hundred weights spend their time in waiting for a second thread.
torch.set_num_threads(1)
# Accelerate looks for DeepSpeed's files several times in each training.
imports._is_package_available = functools.cache(imports._is_package_available)


@pytest.hookimpl(tryfirst=True)  # before `-m slow` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests are skipped unless RUN_SLOW=1 is set."""
    for item in filter(is_slow, items):
        item.add_marker("slow")
        if not RUN_SLOW:
            item.add_marker(WITHOUT_SLOW)


def pytest_collection_finish() -> None:
    """Each `train()` begins with a full garbage collection: spare it what imports have left.

    By now all of the suite's files are imported, with the libraries that some of them alone need,
    which takes the collector 0.15 s; there are some thousands of trainings.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """Spare it what each file leaves, too: more imports, and results that are kept."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    set_seed(0)


@pytest.fixture(autouse=True)
def _same_environment():
    """TrainingArguments of older versions leave variables of Accelerate behind."""
    before = dict(os.environ)
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        if name not in before:
            del os.environ[name]
