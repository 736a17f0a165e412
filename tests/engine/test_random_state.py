"""The state of the global generators: read cheaply, and put back whatever was drawn in between."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from sam_hf.engine.random_state import RandomState


def draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()


def test_the_random_state_of_torch_python_and_numpy_comes_back():
    state = RandomState([])
    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first
    state.restore()
    assert draw() == first


@pytest.mark.parametrize("drawn_before", [0, 1, 2, 3])
@pytest.mark.parametrize("drawn_between", [1, 2])
def test_the_gaussian_that_numpy_has_left_over_comes_back(drawn_before, drawn_between):
    """NumPy draws Gaussians in pairs: after an odd number of them, the next one is there."""
    np.random.seed(0)
    np.random.randn(drawn_before)
    for _ in range(3):  # whatever was read before
        state = RandomState()
        expected = np.random.randn(3).tolist(), np.random.rand(2).tolist()
        state.restore()
        np.random.randn(drawn_between)
        state.restore()
        assert (np.random.randn(3).tolist(), np.random.rand(2).tolist()) == expected
        state.restore()


def test_the_gaussian_is_dropped_where_there_was_none():
    np.random.seed(0)
    state = RandomState()
    expected = np.random.randn(2).tolist()
    np.random.seed(0)
    np.random.randn(1)
    state.restore()
    assert np.random.randn(2).tolist() == expected


def test_a_gaussian_that_was_used_up_by_itself_is_put_back():
    """Using it up changes nothing else: the generator's own memory is the same before and after."""
    np.random.seed(0)
    np.random.randn(1)
    RandomState()
    state = RandomState()
    (expected,) = np.random.randn(1)
    RandomState()
    state.restore()
    assert np.random.randn(1) == expected
    RandomState()
    state.restore()
    assert np.random.randn(1) == expected


def test_several_states_of_numpy_come_back_in_any_order():
    states, expected = [], []
    for _ in range(3):
        states.append(RandomState())
        expected.append(np.random.rand(700).tolist())  # more than the generator makes at once
    for i in (2, 0, 1, 1, 0):
        states[i].restore()
        assert np.random.rand(700).tolist() == expected[i]


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_as_many_numbers_as_bring_the_position_back_are_noticed(draw):
    """The generator makes 624 words at once, and a number takes two."""
    draw()
    RandomState()
    for _ in range(312):
        draw()
    state = RandomState()
    expected = draw()
    state.restore()
    assert draw() == expected


def test_a_state_is_not_read_again_while_nothing_was_drawn(monkeypatch):
    np.random.seed(0)
    RandomState()
    reads = []
    real = np.random.get_state
    monkeypatch.setattr(np.random, "get_state", lambda **kw: reads.append(1) or real(**kw))
    for _ in range(3):
        RandomState().restore()
    assert not reads
    np.random.rand()
    RandomState()
    assert len(reads) == 1


@pytest.mark.parametrize("generator", ["PCG64", "Philox", "SFC64"])
def test_another_generator_in_numpys_place_comes_back(generator):
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(getattr(np.random, generator)(1))
        np.random.randn(1)
        for _ in range(2):
            state = RandomState()
            first = np.random.randn(3).tolist(), np.random.rand(2).tolist()
            assert np.random.rand(2).tolist() != first[1]
            state.restore()
            assert (np.random.randn(3).tolist(), np.random.rand(2).tolist()) == first
    finally:
        np.random.set_bit_generator(before)
    state = RandomState()
    expected = np.random.rand(2).tolist()
    state.restore()
    assert np.random.rand(2).tolist() == expected


def test_where_nobody_imported_numpy_it_is_not_imported():
    # In a process of its own, in which the package does not import the Trainer.
    code = (
        "import importlib.util, sys;"
        "sys.modules['numpy'] = None\nimport torch, random\ndel sys.modules['numpy'];"
        f"spec = importlib.util.spec_from_file_location('r', {RandomState_file()!r});"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "state = module.RandomState(); a = torch.rand(2).tolist(), random.random();"
        "state.restore(); assert (torch.rand(2).tolist(), random.random()) == a;"
        "assert 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def RandomState_file() -> str:  # noqa: N802
    return sys.modules[RandomState.__module__].__file__
