"""The benchmark: its rows, its meter and its refusals. No time that it measures is tested."""

from __future__ import annotations

import json

import pytest
import torch
from slow import RUN_SLOW, slow_unless
from transformers import BertConfig, T5Config, Trainer, Wav2Vec2Config

pytest.importorskip("sam_hf")

import benchmark_step
from benchmark_tables import host_table
from benchmark_utils import (
    WARM_UP,
    HandWrittenTrainer,
    LaunchCounter,
    MultiTensorTrainer,
    TwoPassTrainer,
    WindowClock,
    build_model,
    peak_memory,
)

TINY = ["--model", "transformer-tiny", "--batch_size", "2", "--sequence_length", "16"]
TINY += ["--threads", "1"]
MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One run of all rows, through the command line: (what it returned, printed, and wrote)."""
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        result = benchmark_step.main(
            [*TINY, "--rounds", "2", "--imports", str(int(RUN_SLOW)), "--output_json", str(path)]
        )
    return result, printed[0], json.loads(path.read_text())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("transformer-tiny", 16)


@pytest.fixture
def trainer(model, tmp_path):
    """Build a benchmark row's trainer, or one of another class."""

    def build(name: str, trainer_class: type[Trainer] | None = None) -> Trainer:
        with pytest.MonkeyPatch.context() as patch:
            if trainer_class is not None:
                patch.setitem(benchmark_step.ROWS, name, (trainer_class, {}, False))
            options = benchmark_step.BenchmarkArguments(
                model="transformer-tiny", batch_size=2, sequence_length=16
            )
            examples = benchmark_step.random_examples(model, 4, 16)
            return benchmark_step.build_trainer(name, options, model, examples, str(tmp_path), None)

    return build


def test_the_table_has_a_line_for_every_row(result):
    result, printed, _ = result
    assert list(result["rows"]) == list(benchmark_step.ROWS)
    for name in benchmark_step.ROWS:
        assert sum(line.startswith(f"{name}  ") for line in printed.splitlines()) == 1
    for row in result["rows"].values():
        assert len(row["seconds"]) == 2
        assert all(s > 0 for s in row["seconds"])


def test_the_json_file_holds_what_the_table_was_made_of(result):
    result, printed, written = result
    assert written == json.loads(json.dumps(result))
    assert benchmark_step.table(written) == printed


@pytest.mark.slow
def test_both_imports_are_measured(result):
    result, printed, _ = result
    assert list(result["imports"]) == ["import sam_hf", "from sam_hf import SAMTrainer"]
    for added, before in result["imports"].values():
        assert added >= 0
        assert 0.1 < before < 120  # torch cannot be there in less
    assert "import sam_hf: " in printed


def test_the_hand_written_loop_needs_one_copy_and_two_plain_passes_need_nothing(
    result,
):
    rows = result[0]["rows"]
    perturbed = rows["hand-written"]["perturbed_bytes"]
    assert rows["plain"]["extra_bytes"] == 0
    assert abs(rows["two passes"]["extra_bytes"]) < 0.05 * perturbed
    assert rows["hand-written"]["extra_bytes"] == pytest.approx(perturbed, rel=0.1)
    assert rows["hand-written, swap"]["extra_bytes"] == pytest.approx(perturbed, rel=0.1)
    assert rows["sam, norms"]["perturbed_bytes"] < 0.1 * perturbed


def test_the_meter_shows_the_most_that_was_held_at_a_time(model):
    def work():
        kept = [torch.empty(MIB, dtype=torch.uint8) for _ in range(3)]
        kept.pop()
        kept.append(torch.empty(MIB // 2, dtype=torch.uint8))

    assert peak_memory(work, model) == 3 * MIB


@slow_unless(is_kept=[True])
@pytest.mark.parametrize(("is_kept", "copies"), [(False, 1), (True, 2)])
def test_an_extra_copy_of_the_parameters_shows_as_one_and_a_kept_one_is_not_overlooked(
    trainer, model, is_kept, copies
):
    class WithCopy(Trainer):
        kept = None

        def training_step(self, model, *args, **kwargs):
            copy = [p.detach().clone() for p in model.parameters()]
            loss = super().training_step(model, *args, **kwargs)
            self.kept = copy if is_kept else None  # until now, that of the last update was there
            return loss

    plain, with_copy = trainer("plain"), trainer("plain", WithCopy)
    for each in (plain, with_copy):
        each.train()  # makes the optimizer's state
        each.kept = None
    base = peak_memory(lambda: benchmark_step.two_updates(plain), model)
    peak = peak_memory(lambda: benchmark_step.two_updates(with_copy), model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (peak - base) / size == pytest.approx(copies, abs=0.02)


@pytest.mark.parametrize(
    ("name", "trainer_class"),
    [
        ("hand-written", None),
        ("hand-written, swap", None),
        ("hand-written", MultiTensorTrainer),
    ],
)
def test_the_hand_written_loop_is_sam(trainer, model, name, trainer_class):
    """Its gradient is the one at w + e, and the weights are back before the optimizer steps."""
    model.eval()  # without dropout: the loop does not repeat the masks
    model.train = lambda mode=True: model
    built = trainer(name, trainer_class)
    batch = built.data_collator(built.train_dataset[:2])
    before = [p.detach().clone() for p in model.parameters()]

    model(**batch).loss.backward()
    g = [p.grad for p in model.parameters()]
    scale = HandWrittenTrainer.rho / torch.cat([x.flatten() for x in g]).norm()
    with torch.no_grad():
        for p, x in zip(model.parameters(), g, strict=True):
            p += scale * x
    model.zero_grad()
    model(**batch).loss.backward()
    g_s = [p.grad for p in model.parameters()]
    with torch.no_grad():
        for p, w in zip(model.parameters(), before, strict=True):
            p.copy_(w)
    model.zero_grad()

    built.current_gradient_accumulation_steps = 1
    built.training_step(model, batch)
    for p, w, expected in zip(model.parameters(), before, g_s, strict=True):
        assert torch.equal(p, w)
        torch.testing.assert_close(p.grad, expected)


def test_two_passes_leave_the_gradient_of_one(trainer, model):
    built = trainer("two passes")
    assert type(built) is TwoPassTrainer
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    batch = built.data_collator(built.train_dataset[:2])
    built.current_gradient_accumulation_steps = 1
    built.training_step(model, batch)
    assert len(calls) == 2
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(**batch).loss.backward()
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_both_passes_of_the_multi_tensor_loop_draw_the_same_dropout_masks(trainer, model):
    built = trainer("hand-written", MultiTensorTrainer)
    masks = []
    dropout = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0)
    dropout.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    batch = built.data_collator(built.train_dataset[:2])
    built.current_gradient_accumulation_steps = 1
    built.training_step(model, batch)
    assert len(masks) == 2
    assert masks[0].any() and torch.equal(*masks)


def test_a_steady_turn_reads_the_clock_twice(trainer, model, monkeypatch):
    readings = iter([100.0, 108.0])
    monkeypatch.setattr(WindowClock, "_now", staticmethod(lambda: next(readings)))
    built = trainer("plain")
    seconds = benchmark_step.take_turns({"plain": built}, 0, WindowClock, WARM_UP + 4)
    assert built.state.global_step == WARM_UP + 4
    assert seconds == {"plain": []}  # the first turn does not count
    clock = built.callback_handler.callbacks[-1]
    assert clock.seconds == [2.0]


@pytest.mark.slow
def test_the_steady_table_has_one_time_for_every_turn(capsys):
    options = ["--steady", "--updates", "3", "--rounds", "2", "--rows", "sam", "--imports", "0"]
    result = benchmark_step.main([*TINY, *options])
    assert list(result["rows"]) == ["plain", "two passes", "sam"]
    assert all(len(row["seconds"]) == 2 for row in result["rows"].values())
    assert "2 rounds of 3 updates" in capsys.readouterr().out


@pytest.mark.slow
def test_the_host_table_has_a_line_for_every_model(tmp_path, capsys):
    path = tmp_path / "host.json"
    result = benchmark_step.main(
        ["--host", "--rounds", "1", "--updates", "2", "--output_json", str(path)]
    )
    printed = capsys.readouterr().out
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert host_table(result) in printed
    assert "launches beyond the passes" in printed
    for name, model in result["host"].items():
        assert sum(line.startswith(f"{name}  ") for line in printed.splitlines()) == 1
        assert list(model["seconds"]) == list(model["launches"]) == list(benchmark_step.HOST_ROWS)
        assert all(len(seconds) == 1 for seconds in model["seconds"].values())
        # Five multi-tensor operators and five for the step size, for 4 tensors and for 80.
        launches = model["launches"]
        assert launches["hand-written"] - launches["two passes"] == 10
        assert launches["sam"] > launches["two passes"] > launches["plain"]
    hosts = result["host"]
    small, long = hosts["2 layers, 4 tensors"], hosts["2 layers, two long lists"]
    assert small["launches"] == long["launches"]
    assert sum(name.endswith(", own loop") for name in hosts) == 3


def test_the_host_table_compares_what_is_beyond_the_passes():
    seconds = {"plain": [1.0], "two passes": [3.0, 2.0, 2.0], "hand-written": [2.5], "sam": [2.75]}
    launches = {"plain": 10, "two passes": 20, "hand-written": 25, "sam": 27}
    model = {"seconds": {k: [1e-6 * 100 * s for s in v] for k, v in seconds.items()}}
    result = {
        "options": {"rounds": 3, "updates": 5},
        "threads": 1,
        "host": {"tiny": model | {"launches": launches}},
    }
    line = benchmark_step.table(result).splitlines()[-1]
    assert line.split() == ["tiny", "100", "200", "50", "75", "1.50", "1.10", "7"]


def test_a_multi_tensor_operator_counts_once_and_a_view_not_at_all():
    tensors = [torch.ones(2, 2) for _ in range(3)]
    with LaunchCounter() as counter:
        torch._foreach_add_(tensors, 1)
        tensors[0].view(4).mul_(2)
        torch.empty_like(tensors[0])
    assert counter.launches == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "--device", "cuda"], "host=True does not use device"),
        (["--updates", "5"], "updates=5"),
        (["--steady", "--updates", "0"], "updates=0"),
        (["--steady", "--layout", "ddp"], "steady=True is not allowed with layout='ddp'"),
    ],
)
def test_options_that_a_mode_does_not_use_are_refused(options, said, capsys):
    with pytest.raises(SystemExit) as exit_info:
        benchmark_step.main(options)
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rounds", "0"], "rounds=0"),
        (["--batch_size", "-1"], "batch_size=-1"),
        (["--threads", "0"], "threads=0"),
        (["--imports", "-1"], "imports=-1"),
        (["--rows", "sgd"], "sgd"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--sequence_length", "100000"], "sequence_length=100000"),
        (["--output_json", "/no/such/folder/x.json"], "/no/such/folder"),
        (["--dtype", "fp8"], "fp8"),
        (["--device", "tpu"], "tpu"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_a_bad_option_ends_with_one_line_and_code_2(options, said, capsys):
    with pytest.raises(SystemExit) as exit_info:
        benchmark_step.main([*TINY[:2], "--imports", "0", *options])
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_info:
        benchmark_step.main([*TINY, "--device", "cuda"])
    assert exit_info.value.code == 2
    assert "--device cpu" in capsys.readouterr().err


@slow_unless(config_class=[BertConfig])
@pytest.mark.parametrize(
    ("config_class", "sizes"),
    [
        (BertConfig, {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}),
        (
            T5Config,
            {"d_model": 16, "d_kv": 8, "num_layers": 1, "d_ff": 32, "decoder_start_token_id": 0},
        ),
    ],
)
def test_a_model_folder_needs_only_a_configuration(config_class, sizes, tmp_path, capsys):
    config_class(vocab_size=50, num_attention_heads=2, **sizes).save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), *TINY[2:], "--rounds", "1", "--imports", "0"]
    result = benchmark_step.main([*arguments, "--rows", "sam"])
    assert list(result["rows"]) == ["plain", "two passes", "sam"]
    sam_line = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert sam_line[4] == "-"  # there is no hand-written row to compare with


def test_a_model_of_sounds_is_refused(tmp_path):
    Wav2Vec2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a language model nor one that classifies"):
        build_model(str(tmp_path), 16)
