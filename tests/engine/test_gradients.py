"""Which gradients are those of the recorded losses, and which are foreign."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from sam_hf.engine.gradients import GradientLedger
from sam_hf.engine.layout import Layout


class Model:
    """Three parameters in float64, of which each loss reaches those that it is told to."""

    def __init__(self, *, is_watched: bool, in_buffers: bool = False) -> None:
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.full((2,), 1.0, dtype=torch.float64)) for _ in range(3)]
        )
        # In captured graphs and in DDP's buckets a backward pass writes where the last one did.
        layout = Layout(list(self.weights), self.weights, is_compiled=in_buffers)
        self.ledger = GradientLedger(layout, list(self.weights), is_watched)

    def backward(self, **slopes: float) -> None:
        """Add the gradient of a loss: `b=2.0` is 2 in the second parameter."""
        sum((self.weights["abc".index(n)] * s).sum() for n, s in slopes.items()).backward()

    def grads(self) -> list[float | None]:
        return [None if p.grad is None else float(p.grad[0]) for p in self.weights]


each_kind = pytest.mark.parametrize("is_watched", [False, True])
each_memory = pytest.mark.parametrize("in_buffers", [False, True])


@each_kind
@each_memory
def test_what_was_there_before_the_first_loss_is_set_aside_and_added_afterwards(
    is_watched, in_buffers
):
    model = Model(is_watched=is_watched, in_buffers=in_buffers)
    ledger = model.ledger
    model.backward(a=10.0, b=20.0)  # a penalty's own backward pass
    for number in (1, 2):
        ledger.take()
        assert model.grads() == ([None] * 3 if number == 1 else [1.0, None, 2.0])
        model.backward(a=1.0, c=2.0)
        ledger.show()
        assert model.grads() == [10.0 + number, 20.0, 2.0 * number]
    ledger.take()
    assert model.grads() == [2.0, None, 4.0]  # g
    ledger.clear()
    model.backward(a=5.0, c=6.0)  # g_s
    ledger.finish()
    assert model.grads() == [15.0, 20.0, 6.0]
    ledger.finish()  # it was added
    assert model.grads() == [15.0, 20.0, 6.0]


@each_kind
def test_without_foreign_gradients_the_sum_is_that_of_plain_training(is_watched):
    model = Model(is_watched=is_watched)
    ledger = model.ledger
    for number in (1, 2, 3):
        ledger.take()
        model.backward(a=1.0)
        ledger.show()
        assert model.grads() == [number, None, None]
    ledger.take()
    ledger.finish()
    assert model.grads() == [3.0, None, None]


def test_what_is_written_between_two_losses_is_foreign_where_it_is_watched():
    model = Model(is_watched=True)
    ledger = model.ledger
    ledger.take()
    model.backward(a=1.0, b=1.0)
    ledger.show()
    model.backward(a=10.0)  # added to g
    model.backward(c=30.0)  # where there was none
    model.weights[1].grad.mul_(3.0)  # in place
    assert model.grads() == [11.0, 3.0, 30.0]
    ledger.take()
    assert model.grads() == [1.0, 1.0, None]
    model.backward(a=1.0, b=1.0)
    ledger.show()
    assert model.grads() == [12.0, 4.0, 30.0]
    ledger.take()
    assert model.grads() == [2.0, 2.0, None]
    ledger.clear()
    model.backward(a=5.0, b=5.0)
    ledger.finish()
    assert model.grads() == [15.0, 7.0, 30.0]


def test_a_gradient_that_is_replaced_or_dropped_between_two_losses_is_foreign_by_the_difference():
    model = Model(is_watched=True)
    ledger = model.ledger
    ledger.take()
    model.backward(a=1.0, b=1.0)
    ledger.show()
    model.weights[0].grad = torch.full((2,), 7.0, dtype=torch.float64)
    model.weights[1].grad = None
    ledger.take()
    assert model.grads() == [1.0, 1.0, None]
    ledger.show()
    assert model.grads()[0] == 7.0 and not model.grads()[1]


def change(model: Model) -> None:
    model.weights[0].grad.mul_(2.0)


def replace(model: Model) -> None:
    model.weights[0].grad = torch.ones(2, dtype=torch.float64)


def add(model: Model) -> None:
    model.backward(c=1.0)


@pytest.mark.parametrize("disturb", [change, replace, add])
def test_changed_gradients_without_a_copy_of_g_raise_in_one_line_with_a_way_out(disturb):
    model = Model(is_watched=False)
    model.ledger.take()
    model.backward(a=1.0)
    model.ledger.show()
    disturb(model)
    with pytest.raises(
        RuntimeError, match=r"between two micro-batches.*on_pre_optimizer_step"
    ) as e:
        model.ledger.take()
    assert "\n" not in str(e.value)
    assert "sam_scope='micro_batch' or sam_rho=0" in str(e.value)


def test_changed_gradients_are_told_apart_where_foreign_ones_made_a_copy_of_g_necessary():
    model = Model(is_watched=False)
    model.backward(a=10.0)
    model.ledger.take()
    model.backward(a=1.0)
    model.ledger.show()
    model.backward(a=100.0)
    model.ledger.take()
    assert model.grads() == [1.0, None, None]
    model.ledger.finish()
    assert model.grads() == [111.0, None, None]


@each_kind
def test_take_and_show_may_be_called_twice(is_watched):
    model = Model(is_watched=is_watched)
    model.backward(a=10.0)
    for number in (1, 2):
        model.ledger.take()
        model.ledger.take()
        model.backward(a=1.0)
        model.ledger.show()
        model.ledger.show()
        assert model.grads() == [10.0 + number, None, None]


@each_kind
def test_after_a_reset_all_that_is_there_is_foreign(is_watched):
    model = Model(is_watched=is_watched)
    model.ledger.take()
    model.backward(a=1.0)
    model.ledger.show()
    model.ledger.reset()  # a new scope
    model.ledger.take()
    assert model.grads() == [None, None, None]
    model.backward(a=3.0)
    model.ledger.show()
    assert model.grads() == [4.0, None, None]
    model.ledger.take()
    assert model.grads() == [3.0, None, None]


@each_kind
def test_foreign_gradients_can_be_put_where_the_next_pass_adds_to_them(is_watched):
    model = Model(is_watched=is_watched)
    model.backward(a=10.0, b=20.0)
    model.ledger.take()
    model.backward(a=1.0)
    model.ledger.clear()
    model.ledger.put_foreign()
    assert model.grads() == [10.0, 20.0, None]
    model.backward(a=5.0, c=5.0)
    model.ledger.finish()
    assert model.grads() == [15.0, 20.0, 5.0]


@each_kind
def test_it_is_seen_that_somebody_has_cleared_the_gradients(is_watched):
    model = Model(is_watched=is_watched)
    assert not model.ledger.was_cleared()  # nothing was recorded yet
    model.ledger.take()
    model.backward(a=1.0)
    assert not model.ledger.was_cleared()
    model.ledger.show()
    assert not model.ledger.was_cleared()
    for p in model.weights:
        p.grad = None
    assert model.ledger.was_cleared()
    model.ledger.reset()
    assert not model.ledger.was_cleared()


def test_without_foreign_gradients_and_watching_no_gradient_is_copied():
    model = Model(is_watched=False)
    model.ledger.take()
    model.backward(a=1.0, b=1.0)
    held = [p.grad.data_ptr() for p in model.weights[:2]]
    model.ledger.show()
    model.ledger.take()
    model.ledger.finish()
    assert [p.grad.data_ptr() for p in model.weights[:2]] == held


@each_memory
def test_gradients_that_were_set_aside_are_out_of_reach_of_the_next_backward_pass(in_buffers):
    model = Model(is_watched=False, in_buffers=in_buffers)
    model.backward(a=10.0)
    memory = model.weights[0].grad
    model.ledger.take()
    if in_buffers:
        memory.fill_(77.0)  # as DDP's bucket, or a captured graph
    model.backward(a=1.0)
    model.ledger.finish()
    assert model.grads() == [11.0, None, None]


def test_nothing_holds_g_once_it_is_taken_and_cleared():
    weight = torch.nn.Parameter(torch.ones(3))
    ledger = GradientLedger(Layout([weight], torch.nn.ParameterList([weight])), [weight], False)
    ledger.take()
    weight.sum().backward()
    ledger.show()
    g = weakref.ref(weight.grad)
    ledger.take()
    ledger.clear()
    assert g() is None
