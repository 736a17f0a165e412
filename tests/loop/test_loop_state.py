"""What the second pass finds, and what a loop finds afterwards."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from queue import SimpleQueue

import pytest
import torch
from loops import KINDS, Loop, new_accelerator
from method_twins import METHODS, windows
from tiny import Classifier, assert_same_bits, examples, weights
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from sam_hf import SAM, SAMConfig

every_kind = pytest.mark.parametrize("kind", KINDS)
BATCH = default_collate(examples(6).rows)
OTHER = default_collate(examples(6, seed=1).rows)


def new_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return Classifier(dropout)


def new_sam(model: nn.Module, **options) -> SAM:
    return SAM(model, torch.optim.SGD(model.parameters(), lr=0.1), SAMConfig(**options))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def plain_gradients(model: nn.Module, *batches) -> list[torch.Tensor]:
    model.zero_grad()
    sum(model(**batch)["loss"] for batch in batches).backward()
    return gradients(model)


def assert_near(actual, expected, atol=1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ---- Failures --------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
@pytest.mark.parametrize("fails_in_call", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
def test_w_is_back_to_the_bit_whatever_the_closure_raises_and_the_loop_goes_on(
    error, fails_in_call, scope, kind
):
    """A failed update leaves no trace: the next one is that of a run without the failure."""
    window = windows(examples(8).rows, 4, 2, 1)[0]
    loop = Loop(kind, new_model(0.3), {"sam_scope": scope}, 2)
    before, calls = weights(loop.model), 0
    forward = loop.model.forward

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        out = forward(*args, **kwargs)
        if calls == fails_in_call:
            raise error("on purpose")
        return out

    loop.model.forward = failing
    torch.manual_seed(1)
    with pytest.raises(error, match="on purpose"):
        loop.update(window)
    assert_same_bits(loop.model, before)
    loop.model.forward = forward
    loop.optimizer.zero_grad()
    if loop.accelerator is not None:
        loop.accelerator.step = 0  # the loop begins its update anew
    torch.manual_seed(1)
    loop.update(window)

    whole = Loop(kind, new_model(0.3), {"sam_scope": scope}, 2)
    torch.manual_seed(1)
    whole.update(window)
    assert_same_bits(loop.model, weights(whole.model))


# ---- State -----------------------------------------------------------------------------------


@pytest.mark.parametrize("replays", [True, False])
def test_dropout_masks_are_those_of_the_first_pass_if_they_are_replayed(replays):
    model = new_model(0.5)
    torch.manual_seed(3)
    expected = plain_gradients(model, BATCH)
    sam = new_sam(model, sam_rho=1e-9, sam_replay_rng=replays)
    model.zero_grad()
    torch.manual_seed(3)
    sam.backward(lambda: model(**BATCH)["loss"])
    is_same = all(
        torch.allclose(a, b, rtol=0, atol=1e-6)
        for a, b in zip(gradients(model), expected, strict=True)
    )
    assert is_same == replays


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, dtype=torch.float64)
        self.head = nn.Linear(5, 3, dtype=torch.float64)
        self.calls = 0

    def forward(self, x, labels):
        self.calls += 1
        return cross_entropy(self.head(self.norm(x)), labels)


def test_running_statistics_and_counters_of_all_modules_of_the_closure_change_once():
    torch.manual_seed(0)
    model, teacher, plain = Normed(), Normed(), Normed()
    plain.load_state_dict(model.state_dict())
    sam = new_sam(model)
    for _ in range(3):
        sam.backward(lambda: model(**BATCH) + 0.1 * teacher(**BATCH))
        plain(**BATCH)
        model.zero_grad()
    for module in (model, teacher):
        assert module.norm.num_batches_tracked == 3 and module.calls == 3
    assert_near(model.norm.running_mean, plain.norm.running_mean, 0)
    assert_near(model.norm.running_var, plain.norm.running_var, 0)


def test_a_loop_may_rebind_and_change_its_variables_before_the_update_is_complete():
    """As a cell, in a helper function, as a default, as an argument of a partial, in a dict."""
    expected = plain_gradients(new_model(), BATCH, OTHER)

    def loss_of(model, batch):
        batch = dict(batch)
        return model(batch.pop("x"), batch.pop("labels"))["loss"]

    def by_cell(model, batch):
        return lambda: model(**batch)["loss"]

    def by_default(model, batch):
        return lambda batch=batch: model(**batch)["loss"]

    def by_partial(model, batch):
        return functools.partial(loss_of, model, batch)

    def by_popping(model, batch):
        return lambda: model(batch.pop("x"), batch.pop("labels"))["loss"]

    for make in (by_cell, by_default, by_partial, by_popping):
        model = new_model()
        sam = new_sam(model, sam_rho=1e-9)
        for number, source in enumerate((BATCH, OTHER), 1):
            batch = dict(source)
            sam.backward(make(model, batch), end_of_update=number == 2)
            batch.clear()
        assert_near(gradients(model), expected)

    model = new_model()
    sam = new_sam(model, sam_rho=1e-9)
    for number, batch in enumerate((BATCH, OTHER), 1):

        def helper():
            return model(**batch)["loss"]  # noqa: B023

        sam.backward(lambda: helper(), end_of_update=number == 2)
    assert_near(gradients(model), expected)


SCRIPT = """
model, sam = new_model(), None
sam = new_sam(model, sam_rho=1e-9)
outputs = []

def compute():
    global latest
    latest = model(**batch)
    outputs.append(1)
    return latest["loss"]

for number, batch in enumerate((BATCH, OTHER), 1):
    sam.backward(lambda: compute(), end_of_update=number == 2)
result = gradients(model)
"""


def test_the_variables_of_a_script_are_bound_too_and_what_a_closure_writes_it_writes_once():
    names = {n: globals()[n] for n in ("new_model", "new_sam", "gradients", "BATCH", "OTHER")}
    exec(SCRIPT, names)
    assert_near(names["result"], plain_gradients(new_model(), BATCH, OTHER))
    assert names["outputs"] == [1, 1]
    assert_near(names["latest"]["loss"].item(), new_model()(**OTHER)["loss"].item(), 1e-6)


def test_a_closure_s_nonlocal_is_that_of_the_first_pass():
    model, seen, is_second = new_model(), [], []
    sam = new_sam(model, sam_rho=0.5)
    logits = None

    def closure():
        nonlocal logits
        out = model(**BATCH)
        logits = out["logits"]
        seen.append(len(seen))
        is_second.append(sam.is_in_descent_pass)
        return out["loss"]

    for _ in range(2):
        sam.backward(closure)
        model.zero_grad()
    assert seen == [0, 1] and is_second == [False] * 2 and not sam.is_in_descent_pass
    assert_near(logits, new_model()(**BATCH)["logits"], 0)


def test_inputs_that_a_closure_writes_in_place_are_those_of_the_first_pass():
    tripled = {"x": 3 * BATCH["x"], "labels": BATCH["labels"]}
    model, expected = new_model(), plain_gradients(new_model(), tripled)
    sam = new_sam(model, sam_rho=1e-9)
    for _ in range(2):
        batch = {k: v.clone() for k, v in BATCH.items()}

        def closure():
            batch["x"].mul_(3)  # noqa: B023
            return model(**batch)["loss"]  # noqa: B023

        model.zero_grad()
        sam.backward(closure)
        assert_near(gradients(model), expected)


def drain(queue: SimpleQueue) -> list:
    """What passes have put: a queue is no state that SAM would restore."""
    return [queue.get() for _ in range(queue.qsize())]


def test_parameters_and_long_lists_are_those_of_the_loop():
    torch.manual_seed(0)
    model = nn.Linear(5, 3, dtype=torch.float64)
    data, weight, seen = list(range(5000)), model.weight, SimpleQueue()
    sam = new_sam(model, sam_rho=0.1)

    def closure():
        seen.put(id(data))
        return (weight * data[3]).square().sum()

    sam.backward(closure)
    assert_near(model.weight.grad, 18 * (model.weight + 0.1 * model.weight / model.weight.norm()))
    assert drain(seen) == [id(data)] * 2


def test_after_the_first_pass_inputs_are_copied_only_if_they_are_written():
    model = new_model()
    sam = new_sam(model)
    for _ in range(2):
        batch = {"x": BATCH["x"].clone(), "labels": BATCH["labels"].clone()}

        def closure():
            batch["x"].add_(1)  # noqa: B023
            return model(**batch)["loss"]  # noqa: B023

        sam.backward(closure)
        model.zero_grad()
    kept = sam._closures.keep(closure)
    assert {x.path for x in kept._inputs if x.copy is not None} == {"batch.x"}


def test_a_loop_may_reuse_the_memory_of_a_batch():
    model, expected = new_model(), plain_gradients(new_model(), BATCH, OTHER)
    sam, buffer = new_sam(model, sam_rho=1e-9), {k: v.clone() for k, v in BATCH.items()}
    for source, is_end in ((BATCH, False), (OTHER, True)):
        for name, tensor in source.items():
            buffer[name].copy_(tensor)
        sam.backward(lambda: model(**buffer)["loss"], end_of_update=is_end)
    assert_near(gradients(model), expected)
    assert all(torch.equal(buffer[name], tensor) for name, tensor in OTHER.items())


def test_inputs_that_are_written_for_the_first_time_later_are_told():
    model, calls = new_model(), SimpleQueue()
    sam = new_sam(model)
    batch = {"x": BATCH["x"].clone(), "labels": BATCH["labels"]}

    def closure():
        calls.put(1)
        if calls.qsize() > 2:
            batch["x"].add_(1)
        return model(**batch)["loss"]

    sam.backward(closure)
    model.zero_grad()
    with pytest.warns(UserWarning, match=r"The input 'batch\.x' of a closure was written"):
        sam.backward(closure)


def exact_gradients(model: nn.Module, loss, rho: float) -> list[torch.Tensor]:
    """g_s by hand, of a loss that may be called again."""
    trained = list(model.parameters())
    g = torch.autograd.grad(loss(), trained)
    norm = torch.stack([x.norm() for x in g]).norm()
    with torch.no_grad():
        before = [p.clone() for p in trained]
        for p, x in zip(trained, g, strict=True):
            p.add_(rho * x / norm)
    g_s = torch.autograd.grad(loss(), trained)
    with torch.no_grad():
        for p, w in zip(trained, before, strict=True):
            p.copy_(w)
    return list(g_s)


class Holder:
    """An object of the user's, whose attributes are the loop's variables."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.batch, self.calls = model, BATCH, 0

    def loss(self):
        self.calls += 1
        return self.model(**self.batch)["loss"]

    __call__ = loss


def _of_the_same_place(weight):
    return lambda out: weight * out["loss"]


def _closures(model):
    """Closures of many kinds, each with the loss that it computes."""

    def weighted(factor):
        return lambda: factor * model(**BATCH)["loss"]

    first, second = _of_the_same_place(1.0), _of_the_same_place(0.1)
    settings, cache, holder = {"factor": 1.0}, {}, Holder(model)
    pair, generator = [], torch.Generator().manual_seed(0)
    alias = pair

    def prepare():
        settings["factor"] = 2.0

    def prepared():
        prepare()
        return settings["factor"] * model(**BATCH)["loss"]

    def fill():
        cache["out"] = model(**BATCH)

    def cached():
        fill()
        return cache["out"]["loss"]

    def aliased():
        pair.append(model(**BATCH)["loss"])
        return alias[-1]

    def random():
        noise = torch.randn(6, 5, dtype=torch.float64, generator=generator)
        return model(BATCH["x"] + noise, BATCH["labels"])["loss"]

    def counting():
        counting.calls += 1
        return counting.calls * model(**BATCH)["loss"]

    counting.calls = 0
    start = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 5, dtype=torch.float64, generator=start)
    plain = weighted(1.0)
    return {
        "two functions of one place": (
            lambda: first(model(**BATCH)) + second(model(**BATCH)),
            weighted(1.1),
        ),
        "a helper that writes a dictionary": (prepared, weighted(2.0)),
        "a dictionary between helpers": (cached, plain),
        "two names of one list": (aliased, plain),
        "a generator of its own": (
            random,
            lambda: model(BATCH["x"] + noise, BATCH["labels"])["loss"],
        ),
        "an attribute of the function": (counting, plain),
        "a method": (holder.loss, plain),
        "an object": (holder, plain),
        "a decorated function": (torch.enable_grad()(plain), plain),
        "a function in a dictionary": (lambda: {"f": plain}["f"](), plain),
    }


@pytest.mark.parametrize("name", _closures(new_model()))
def test_closures_of_every_kind_are_replayed_as_they_are(name):
    model = new_model()
    closure, loss = _closures(model)[name]
    expected = exact_gradients(model, loss, 0.3)
    new_sam(model, sam_rho=0.3).backward(closure)
    assert_near(gradients(model), expected, 1e-10)


def test_what_objects_and_hooks_of_the_closure_hold_changes_once():
    model, holder, features = new_model(), None, {}
    holder = Holder(model)
    sam = new_sam(model, sam_rho=0.3)
    hook = model.first.register_forward_hook(lambda *args: features.update(h=args[2]))
    sam.backward(lambda: holder.loss() + 0.1 * features["h"].square().mean())
    hook.remove()
    assert holder.calls == 1
    expected = exact_gradients(
        model,
        lambda: model(**BATCH)["loss"] + 0.1 * model.first(BATCH["x"]).square().mean(),
        0.3,
    )
    assert_near(gradients(model), expected, 1e-10)


def test_the_attributes_that_a_loop_rebinds_are_those_of_each_micro_batch():
    model = new_model()
    holder, sam = Holder(model), new_sam(model, sam_rho=1e-9)
    for batch, is_end in ((BATCH, False), (OTHER, True)):
        holder.batch = batch
        sam.backward(holder.loss, end_of_update=is_end)
    assert_near(gradients(model), plain_gradients(new_model(), BATCH, OTHER))
    assert holder.batch is OTHER and holder.calls == 2


def test_a_list_of_any_length_grows_by_one_in_an_update():
    model, losses = nn.Linear(1, 1), [0.0] * 4090
    sam, x = new_sam(model), torch.ones(1, 1)
    for number in range(1, 13):

        def closure():
            loss = model(x).square().sum()
            losses.append(loss.item())
            return loss

        sam.backward(closure)
        model.zero_grad()
        assert len(losses) == 4090 + number


def test_the_batches_that_a_loop_holds_are_not_tracked_for_ever():
    model = new_model()
    sam = new_sam(model)
    batches = [dict(BATCH) for _ in range(200)]
    for batch in batches:
        sam.backward(lambda: model(**batch)["loss"])  # noqa: B023
        model.zero_grad()
    tracker = sam._engine._tracker
    assert len(tracker._containers) < 20 and len(tracker._generators) == 0


def test_a_module_of_one_update_is_not_kept():
    model = new_model()
    sam = new_sam(model)
    extra = nn.BatchNorm1d(5, dtype=torch.float64)
    gone = weakref.ref(extra)
    sam.backward(lambda: model(extra(BATCH["x"]), BATCH["labels"])["loss"])
    assert extra.num_batches_tracked == 1
    extra = None
    for _ in range(2):
        sam.backward(lambda: model(**BATCH)["loss"])
    gc.collect()
    assert gone() is None


# ---- Metrics ---------------------------------------------------------------------------------


def test_metrics_are_those_of_the_update_before_they_are_read():
    model = new_model()
    sam = new_sam(model, sam_rho=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def update() -> None:
        sam.backward(lambda: model(**BATCH)["loss"])
        optimizer.step()
        optimizer.zero_grad()

    update()
    first = sam.metrics()
    g = torch.cat([x.flatten() for x in plain_gradients(new_model(), BATCH)])
    assert first["sam_ascent_grad_norm"] == pytest.approx(g.norm().item(), rel=1e-6)
    assert first["sam_perturbation_norm"] == pytest.approx(0.2, rel=1e-6)
    assert first["sam_passes_per_update"] == 2
    for _ in range(3):
        update()
    sam.metrics()  # the next call is expected after three more
    for _ in range(3):
        before = plain_gradients(model, BATCH)
        model.zero_grad()
        update()
    norm = torch.cat([x.flatten() for x in before]).norm().item()
    assert sam.metrics()["sam_ascent_grad_norm"] == pytest.approx(norm, rel=1e-6)


def test_metrics_are_measured_only_in_updates_after_which_they_are_expected(monkeypatch):
    measured = []
    model = new_model()
    sam = new_sam(model)
    monkeypatch.setattr(
        type(sam._engine), "_measure", lambda self, *_: measured.append(sam._updates)
    )
    for update in range(1, 13):
        sam.backward(lambda: model(**BATCH)["loss"])
        model.zero_grad()
        if update % 4 == 0:
            sam.metrics()
    assert measured == [0, 7, 11]


# ---- Checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vasso", "friendly_sam", "looksam", "trigger", "interval"])
def test_a_run_that_is_saved_and_loaded_by_accelerate_is_the_same_to_the_bit(name, tmp_path):
    special = {
        "trigger": {"sam_trigger": "gradient_norm"},
        "interval": {"sam_interval": 3},
    }
    sam = special.get(name) or METHODS[name]
    updates = windows(examples(24).rows, 4, 1, 9)
    make = functools.partial(Loop, "accelerate", sam=sam, total_steps=9)
    whole = make(model=new_model(0.2))
    torch.manual_seed(5)
    for window in updates:
        whole.update(window)

    first = make(model=new_model(0.2))
    first.accelerator.register_for_checkpointing(first.sam)
    torch.manual_seed(5)
    for window in updates[:4]:
        first.update(window)
    first.accelerator.save_state(str(tmp_path))

    second = make(model=new_model(0.2))
    second.accelerator.register_for_checkpointing(second.sam)
    second.accelerator.load_state(str(tmp_path))
    for window in updates[4:]:
        second.update(window)
    assert_same_bits(second.model, weights(whole.model))


def test_a_state_of_another_method_is_refused_and_other_options_are_told():
    state = new_sam(new_model(), sam_method="vasso").state_dict()
    with pytest.raises(ValueError, match="sam_method='vasso'"):
        new_sam(new_model()).load_state_dict(state)
    with pytest.warns(UserWarning, match=r"sam_rho=0.3 \(was None\)"):
        new_sam(new_model(), sam_method="vasso", sam_rho=0.3).load_state_dict(state)


# ---- Precision, compilation, several models --------------------------------------------------


@pytest.mark.parametrize("where", ["around", "inside"])
def test_under_autocast_the_closure_computes_in_half_precision_and_the_engine_does_not(where):
    model = Classifier(dtype=torch.float32)
    batch = {"x": BATCH["x"].float(), "labels": BATCH["labels"]}
    sam, kinds = new_sam(model, sam_rho=0.1), set()

    def closure():
        if where == "inside":
            with torch.autocast("cpu", torch.bfloat16):
                out = model(**batch)
        else:
            out = model(**batch)
        kinds.add(str(out["logits"].dtype))
        return out["loss"].float()

    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        sam.backward(closure)
    assert kinds == {"torch.bfloat16"}
    # |e| is exact to fp32: no product of the engine was rounded to bfloat16.
    assert sam.metrics()["sam_perturbation_norm"] == pytest.approx(0.1, rel=1e-5)


def test_within_autocast_of_the_loop_e_is_computed_in_full_precision():
    """Long inner products would be rounded to bfloat16."""
    torch.manual_seed(0)
    model, x, moved = nn.Linear(300, 300), torch.randn(4, 300), SimpleQueue()
    w = weights(model)

    def closure():
        parts = [p.detach() - w[n] for n, p in model.named_parameters()]
        moved.put(torch.cat([part.flatten() for part in parts]).norm().item())
        return model(x).float().square().mean()

    with torch.autocast("cpu", torch.bfloat16):
        new_sam(model, sam_rho=0.1).backward(closure)
    assert drain(moved) == [0, pytest.approx(0.1, rel=1e-5)]


def test_a_gradient_scaler_scales_both_passes_and_its_skipped_steps_change_nothing():
    model, plain = new_model().float(), new_model().float()
    batch = {"x": BATCH["x"].float(), "labels": BATCH["labels"]}
    for scaled, module in ((True, model), (False, plain)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        sam = SAM(module, optimizer, SAMConfig(sam_rho=0.3), scaler=scaler)
        for _ in range(4):
            sam.backward(lambda m=module: m(**batch)["loss"])
            scaler.step(optimizer) if scaled else optimizer.step()
            scaler.update() if scaled else None
            optimizer.zero_grad()
        reading = sam.metrics()["sam_ascent_grad_norm"]
        assert reading == pytest.approx(0.5, abs=0.45)  # without the scale
    assert_near(weights(model), weights(plain))

    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = SAM(model, optimizer, SAMConfig(sam_rho=0.3), scaler=scaler)
    sam.backward(lambda: model(**batch)["loss"] * 1e38)
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(model, before)
    assert scaler.get_scale() < 2.0**16


def test_accelerate_s_gradient_scaler_scales_both_passes():
    """Accelerate makes one for fp16, on GPUs alone: here it is put in."""
    results = []
    for is_scaled in (False, True):
        accelerator, model = new_accelerator(steps=2), new_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if is_scaled:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
        model, optimizer = accelerator.prepare(model, optimizer)
        sam = SAM(model, optimizer, SAMConfig(sam_rho=0.3), accelerator=accelerator)
        for batch in (BATCH, OTHER) * 2:
            with accelerator.accumulate(model):
                sam.backward(lambda: model(**batch)["loss"])  # noqa: B023
                optimizer.step()
                optimizer.zero_grad()
        results.append((weights(model), sam.metrics()["sam_ascent_grad_norm"]))
    (w, norm), (w_scaled, norm_scaled) = results
    assert_near(w_scaled, w, 1e-10)
    assert norm_scaled == pytest.approx(norm, rel=1e-6)


@pytest.mark.slow
def test_a_compiled_model_trains_as_it_does_without():
    results = []
    for is_compiled in (False, True):
        model = new_model()
        called = torch.compile(model, backend="aot_eager") if is_compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sam = SAM(called, optimizer, SAMConfig(sam_rho=0.3))
        for batch in (BATCH, OTHER, BATCH):
            sam.backward(lambda: called(**batch)["loss"])  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    assert_near(results[1], results[0], 1e-10)


def test_two_models_in_one_loop_have_one_sam_each():
    """A generator and a discriminator: each update is that of a loop with that model alone."""
    torch.manual_seed(0)
    parts = [nn.Linear(5, 5, dtype=torch.float64), nn.Linear(5, 1, dtype=torch.float64)]
    sams = [new_sam(part, sam_rho=0.2) for part in parts]
    generator, judge = parts

    def of_judge():
        return judge(BATCH["x"]).mean() - judge(generator(BATCH["x"]).detach()).mean()

    def of_generator():
        return judge(generator(BATCH["x"])).square().mean()

    for own, sam, closure in ((judge, sams[1], of_judge), (generator, sams[0], of_generator)):
        trained = list(own.parameters())
        g = torch.autograd.grad(closure(), trained)
        norm = torch.stack([x.norm() for x in g]).norm()
        with torch.no_grad():
            before = [p.clone() for p in trained]
            for p, x in zip(trained, g, strict=True):
                p.add_(0.2 * x / norm)
        expected = torch.autograd.grad(closure(), trained)
        with torch.no_grad():
            for p, w in zip(trained, before, strict=True):
                p.copy_(w)
        for part in parts:
            part.zero_grad()
        sam.backward(closure)
        assert_near([p.grad for p in trained], list(expected), 1e-10)
        for part in parts:
            torch.testing.assert_close(
                weights(part), {n: p.detach() for n, p in part.named_parameters()}
            )


def test_a_rho_of_zero_is_plain_training_to_the_bit():
    model, plain = new_model(), new_model()
    sam = new_sam(model, sam_rho=0.0)
    loss = sam.backward(lambda: model(**BATCH)["loss"])
    expected = plain(**BATCH)["loss"]
    expected.backward()
    assert torch.equal(loss, expected.detach()) and not loss.requires_grad
    assert_near(gradients(model), gradients(plain), 0)
    assert sam.metrics() == {}


def test_accelerate_s_own_options_reach_both_passes():
    accelerator = new_accelerator(mixed_precision="bf16")
    model = Classifier(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    sam, kinds = SAM(model, optimizer, accelerator=accelerator), []
    model.second.register_forward_hook(lambda *args: kinds.append(args[2].dtype))
    batch = {"x": BATCH["x"].float(), "labels": BATCH["labels"]}
    sam.backward(lambda: model(**batch)["loss"])
    assert kinds == [torch.bfloat16] * 2


def test_another_thread_may_hold_a_lock_that_the_closure_uses():
    """Objects that cannot be copied are shared."""
    model, lock = new_model(), threading.Lock()
    sam = new_sam(model)

    def closure():
        with lock:
            return model(**BATCH)["loss"]

    sam.backward(closure)
