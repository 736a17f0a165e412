"""Time and memory of a SAM update, compared with plain training and hand-written SAM.

    python scripts/benchmarks/benchmark_step.py  # 40M parameters, on the CPU
    python scripts/benchmarks/benchmark_step.py --device cuda --dtype bf16 --batch_size 32
    python scripts/benchmarks/benchmark_step.py --model bert-base-uncased --output_json bert.json
    python scripts/benchmarks/benchmark_step.py --layout ddp --processes 2  # starts them itself
    python scripts/benchmarks/benchmark_step.py --device cuda --steady  # no pause between updates
    python scripts/benchmarks/benchmark_step.py --host  # Python and dispatch overhead

Every row is a Trainer that runs its own training loop: forward and backward passes, clipping, the
optimizer step, clearing the gradients. All share one model and one optimizer, and take turns in an
order that is reshuffled in every round.

    plain                one pass
    two passes           two passes and nothing between them: the floor for SAM
    hand-written         two passes, and for each parameter norm, clone, add, copy back
    hand-written, swap   the same, with the copy put in the parameter's place (`p.data = w`)
    sam, sam logged, ... SAMTrainer. "logged": an update whose readings (the cosine of g and g_s and
                         others) will be logged: one in ten with logging_steps=10

    ms                   the median over the rounds, followed by the interquartile range. If that is
                         large, other work disturbed the run: take more --rounds
    / two passes         ratio of the medians: what SAM costs beyond its two passes
    / hand-written       ratio of the medians: at most 1 is no slower than by hand
    extra MiB            peak memory over that of the plain row, counted in bytes of tensors
    x perturbed          the same in units of the bytes of the parameters that the row perturbs

By default, a turn is a train() of one update, timed from its first micro-batch to its cleared
gradients, and a GPU is synchronised at both ends. With --steady, it is a train() of many updates:
the mean time per update after a warm-up, including the loading of data. A GPU is synchronised only
at the ends of this window, so that the host can run ahead as in a real run.

With --host, tiny models are trained as with --steady on one CPU thread, by SGD without clipping:
the time is that of Python and of dispatching the operators. The trainers of one model hold two long
lists of numbers, which should make no difference. "own loop" has no Trainer, and `sam_hf.SAM`
instead of SAMTrainer. In microseconds of process time per update:

    hand-written - two passes    a SAM of multi-tensor operations beyond its two passes: gradient
                                 norm, copy, perturbation and restoration of the weights, and
                                 torch's random state replayed
    sam - two passes             the same for SAMTrainer
    ratio                        of these two; the goal is at most 2.0
    whole                        ratio of whole updates, passes and optimizer step included; the
                                 goal for loops is at most 1.5
    launches beyond the passes   operators that SAMTrainer dispatches in addition to those of two
                                 passes, a multi-tensor operator counted once

With a --layout other than "one", each process trains one row after the other, then in reverse, each
with its own model and optimizer, without the hand-written loops. Then:

    all_reduce, ...      calls of this collective in an update, x the MiB that they gather or reduce
    calls / pass         calls of all collectives per pass. SAM's should be at most the plain row's
    sent MiB, / plain    what each process then sends over a ring, and in units of the plain row
    extra MiB            on a GPU only
"""

from __future__ import annotations

import copy
import gc
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from benchmark_layouts import hand_over, is_started, run_rows, start_processes
from benchmark_tables import BY_HAND, FLOOR, PLAIN, table
from benchmark_utils import (
    BUILT_IN,
    WARM_UP,
    Clock,
    HandWrittenSwapTrainer,
    HandWrittenTrainer,
    HostClock,
    LaunchCounter,
    LinearStack,
    Loop,
    MultiTensorTrainer,
    OneUpdate,
    TwoPassTrainer,
    WindowClock,
    build_model,
    import_seconds,
    peak_memory,
    random_examples,
)
from torch.utils.data import default_collate
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from sam_hf import SAMConfig, SAMTrainer
from sam_hf.engine.parameters import select_parameters

Name = TypeVar("Name", bound=Hashable)
# The trainer, its SAM options, and whether each of its updates is logged.
Row = tuple[type[Trainer], dict[str, Any], bool]
ROWS: dict[str, Row] = {
    PLAIN: (Trainer, {}, False),
    FLOOR: (TwoPassTrainer, {}, False),
    BY_HAND: (HandWrittenTrainer, {}, False),
    "hand-written, swap": (HandWrittenSwapTrainer, {}, False),
    "sam": (SAMTrainer, {"sam_rho": 0.05}, False),
    "sam, logged": (SAMTrainer, {"sam_rho": 0.05}, True),
    "sam, auto": (SAMTrainer, {"sam_rho": "auto"}, False),
    "sam, micro_batch": (SAMTrainer, {"sam_rho": 0.05, "sam_scope": "micro_batch"}, False),
    "sam, norms": (SAMTrainer, {"sam_params": "norms", "sam_rho": 0.5}, False),
    "asam": (SAMTrainer, {"sam_method": "asam", "sam_rho": 0.5}, False),
    "asam, auto": (SAMTrainer, {"sam_method": "asam", "sam_rho": "auto"}, False),
    "asam, logged": (SAMTrainer, {"sam_method": "asam", "sam_rho": 0.5}, True),
}
IN_LAYOUTS = [name for name in ROWS if not name.startswith(BY_HAND)]

HOST_ROWS = {name: ROWS[name] for name in (PLAIN, FLOOR, BY_HAND, "sam")}
HOST_ROWS[BY_HAND] = (MultiTensorTrainer, {}, False)
# Linear layers, whether each is followed by BatchNorm, and lengths of lists that the trainer holds.
HOST_MODELS = {
    "2 layers, 4 tensors": (2, False, ()),
    "20 layers, 40 tensors": (20, False, ()),
    "20 layers, BatchNorm, 80 tensors": (20, True, ()),
    "2 layers, two long lists": (2, False, (60_000, 1_000_000)),
}
HOST_OPTIONS = ("host", "rounds", "updates", "threads", "output_json")
STEADY_UPDATES, HOST_UPDATES = 20, 60


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class BenchmarkArguments:
    model: str = option(
        "transformer-40m", f"{' or '.join(BUILT_IN)} (built in), or a model's name or folder."
    )
    batch_size: int = option(8, "Examples in a micro-batch, in each process.")
    accumulation_steps: int = option(1, "Micro-batches in an update.")
    sequence_length: int = option(128, "Tokens in an example. Images have their model's size.")
    rounds: int = option(15, "Number of turns of every row.")
    steady: bool = option(False, "Time many consecutive updates together, not each.")
    host: bool = option(
        False, f"The table of host costs. Its options: {', '.join(HOST_OPTIONS[1:])}."
    )
    updates: int | None = option(
        None, f"Updates in a turn: {STEADY_UPDATES} with --steady, {HOST_UPDATES} with --host."
    )
    rows: list[str] | None = field(
        default=None, metadata={"help": f"Only these and the first two of {', '.join(ROWS)}."}
    )
    layout: Literal["one", "ddp", "fsdp2", "zero1", "zero2"] = option(
        "one", "One process, or how several share the work."
    )
    processes: int = option(2, "How many, in the other layouts.")
    dtype: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "Compute dtype (autocast, fp32 weights; fp16: scaled on a GPU)."
    )
    torch_compile: bool = option(False, "Compile the model.")
    torch_compile_backend: str = option("inductor", "Compiler.")
    device: Literal["cpu", "cuda"] = option("cpu", "Where to run.")
    threads: int | None = option(None, "CPU threads; default: torch's.")
    imports: int = option(5, "Number of measurements of the imports; 0: none.")
    output_json: str | None = option(None, "File for the table and all individual timings.")

    def __post_init__(self) -> None:
        positive = ("batch_size", "accumulation_steps", "sequence_length", "rounds", "threads")
        for name in (*positive, "processes", "updates", "imports"):
            value, least = getattr(self, name), 0 if name == "imports" else 1
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is not allowed. Allowed: {least} and more.")
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        if self.host and (unused := ", ".join(sorted(given.difference(HOST_OPTIONS)))):
            raise ValueError(f"host=True does not use {unused}, but {', '.join(HOST_OPTIONS[1:])}.")
        if self.steady and self.layout != "one":
            raise ValueError(f"steady=True is not allowed with layout={self.layout!r}.")
        if self.updates is not None and not (self.host or self.steady):
            raise ValueError(f"updates={self.updates} needs --steady or --host.")
        if self.updates is None and (self.host or self.steady):
            self.updates = HOST_UPDATES if self.host else STEADY_UPDATES
        allowed = list(ROWS) if self.layout == "one" else IN_LAYOUTS
        if unknown := [row for row in self.rows or [] if row not in allowed]:
            raise ValueError(f"rows={unknown} with layout={self.layout!r}: choose from {allowed}.")
        gpus = torch.cuda.device_count() if self.device == "cuda" else None
        if gpus is not None and self.layout == "one" and gpus != 1:
            many = "set CUDA_VISIBLE_DEVICES to one, or choose --device cpu"
            raise ValueError(f"device='cuda' needs one visible GPU, found {gpus}: {many}.")
        if gpus is not None and self.layout != "one" and gpus < self.processes:
            few = f"found {gpus}: choose fewer, or --device cpu"
            raise ValueError(f"processes={self.processes} need that many GPUs, {few}.")
        if self.layout.startswith("zero") and find_spec("deepspeed") is None:
            raise ValueError(f"layout={self.layout!r} needs DeepSpeed: pip install deepspeed.")
        if self.output_json and not Path(self.output_json).absolute().parent.is_dir():
            raise ValueError(f"output_json={self.output_json!r}: there is no such folder.")


def benchmark(options: BenchmarkArguments) -> dict[str, Any]:
    """Measure. Returns {"rows": {name: {...}}, "parameters": ..., "imports": ...}."""
    model, examples = model_and_examples(options)
    names = [name for name in ROWS if name in (PLAIN, FLOOR) or name in (options.rows or ROWS)]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        warm_up = build_trainer(PLAIN, options, model, examples, folder, None)
        warm_up.train()  # makes the optimizer and its state, which all rows share
        # Without Accelerate's wrapper, which would scale with the warm-up's own scaler of fp16.
        optimizer = warm_up.optimizer.optimizer
        trainers = {}
        for name in names:
            trainer = build_trainer(name, options, model, examples, folder, optimizer)
            rows[name] = {"peak_bytes": peak_memory(lambda t=trainer: two_updates(t), model)}
            trainers[name] = trainer
        clock = WindowClock if options.steady else Clock
        seconds = take_turns(trainers, options.rounds, clock, updates_in_a_turn(options))
    for name, row in rows.items():
        sam_params = ROWS[name][1].get("sam_params", "all")
        perturbed = select_parameters(model, sam_params).values()
        row["seconds"] = seconds[name]
        row["perturbed_bytes"] = sum(p.numel() * p.element_size() for p in perturbed)
        row["extra_bytes"] = row["peak_bytes"] - rows[PLAIN]["peak_bytes"]
    return summary(options, model, rows) | {"imports": import_seconds(options.imports)}


def summary(
    options: BenchmarkArguments, model: torch.nn.Module, rows: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    for row in rows.values():
        row["median_ms"] = 1e3 * statistics.median(row["seconds"])
    return {
        "options": asdict(options),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "inputs": model.main_input_name,
        "rows": rows,
        "imports": {},
    }


def model_and_examples(
    options: BenchmarkArguments,
) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """The model, and two updates' examples for `two_updates`, repeated as a turn needs them."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build_model(options.model, options.sequence_length)
    processes = 1 if options.layout == "one" else options.processes
    count = 2 * options.batch_size * options.accumulation_steps * processes
    repeats = math.ceil(updates_in_a_turn(options) / 2)
    return model, random_examples(model, count, options.sequence_length) * repeats


def benchmark_host(options: BenchmarkArguments) -> dict[str, Any]:
    """Measure host time and operators. Returns {"host": {model: {"seconds": ..., ...}}, ...}."""
    torch.set_num_threads(options.threads or 1)
    torch.manual_seed(0)
    updates = updates_in_a_turn(options)
    trainers, launches = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (layers, has_batch_norm, lengths) in HOST_MODELS.items():
            for row in HOST_ROWS:
                model = LinearStack(layers, has_batch_norm)
                examples = model.examples(updates * options.batch_size)
                given = (row, options, model, examples, folder, None, HOST_ROWS)
                trainer = build_trainer(*given, optim="sgd", max_grad_norm=0.0)
                for length in lengths:
                    setattr(trainer, f"history_{length}", list(range(length)))
                trainers[name, row] = trainer
                launches[name, row] = count_launches(trainer)
                if lengths:
                    continue
                size, loop = options.batch_size, f"{name}, own loop"
                model = copy.deepcopy(model)
                rows = [examples[i : i + size] for i in range(0, len(examples), size)]
                trainers[loop, row] = Loop(row, model, list(map(default_collate, rows)))
                launches[loop, row] = count_launches(trainers[loop, row])
        seconds = take_turns(trainers, options.rounds, HostClock, updates)
    return {
        "options": asdict(options),
        "threads": torch.get_num_threads(),
        "host": {
            name: {
                "seconds": {row: seconds[name, row] for row in HOST_ROWS},
                "launches": {row: launches[name, row] for row in HOST_ROWS},
            }
            for name in dict.fromkeys(name for name, _ in trainers)
        },
    }


def count_launches(trainer: Trainer) -> int:
    """The operators that one update dispatches."""
    counter = LaunchCounter()
    callback = OneUpdate(counter)
    trainer.add_callback(callback)
    trainer.args.max_steps = WARM_UP + 1
    trainer.train()
    trainer.remove_callback(callback)
    return counter.launches


def benchmark_layout(options: BenchmarkArguments) -> dict[str, Any]:
    """Measure in each of the processes. Returns what `benchmark` does."""
    chosen = options.rows or ["sam", "sam, micro_batch"]
    names = [name for name in IN_LAYOUTS if name in (PLAIN, FLOOR) or name in chosen]
    first, examples = model_and_examples(options)
    with tempfile.TemporaryDirectory() as folder:

        def trainer(name: str, model: torch.nn.Module, **more: Any) -> Trainer:
            return build_trainer(name, options, model, examples, folder, None, **more)

        rows = run_rows(names, options, lambda: copy.deepcopy(first), trainer)
    return summary(options, first, rows)


def build_trainer(
    name: str,
    options: BenchmarkArguments,
    model: torch.nn.Module,
    examples: list[dict[str, torch.Tensor]],
    folder: str,
    optimizer: Any,
    rows: dict[str, Row] = ROWS,
    **more: Any,
) -> Trainer:
    trainer_class, sam_options, is_logged = rows[name]
    args = TrainingArguments(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-5,
        gradient_accumulation_steps=options.accumulation_steps,
        bf16=options.dtype == "bf16",
        fp16=options.dtype == "fp16",
        torch_compile=options.torch_compile,
        torch_compile_backend=options.torch_compile_backend if options.torch_compile else None,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=False,
        logging_steps=1 if is_logged else 10**9,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    is_sam = issubclass(trainer_class, SAMTrainer)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=examples,
        optimizers=(optimizer, None),
        **({"sam_config": SAMConfig(**sam_options)} if is_sam else {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def two_updates(trainer: Trainer) -> None:
    """Train for two, so that what is kept from one update to the next counts as memory."""
    trainer.args.max_steps = 2
    trainer.train()


def updates_in_a_turn(options: BenchmarkArguments) -> int:
    return 1 if options.updates is None else WARM_UP + options.updates


def take_turns(
    trainers: dict[Name, Trainer], rounds: int, clock: type[Clock], updates: int
) -> dict[Name, list[float]]:
    """The seconds per update of each trainer in every round. The very first does not count."""
    clocks = {name: clock() for name in trainers}
    for name, trainer in trainers.items():
        trainer.add_callback(clocks[name])
        trainer.args.max_steps = updates
    shuffle = random.Random(0).shuffle  # its own generator: `train` seeds the global one
    order = list(trainers)
    gc.collect()
    gc.freeze()  # or the collection at the end of each train() searches all that is imported
    for _ in range(rounds + 1):
        shuffle(order)
        for name in order:
            trainers[name].train()
    gc.unfreeze()
    return {name: clock.seconds[1:] for name, clock in clocks.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__)
    logging.set_verbosity_error()
    try:
        (options,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        if is_started():
            result = benchmark_layout(options)
            hand_over(result)
            return result
        if options.host:
            result = benchmark_host(options)
        elif options.layout == "one":
            result = benchmark(options)
        else:
            build_model(options.model, options.sequence_length)  # or none of the processes can
            given = sys.argv[1:] if argv is None else argv
            result = start_processes(given, options.processes, options.device == "cpu")
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the process has said why
    print(table(result))
    if options.output_json:
        Path(options.output_json).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
