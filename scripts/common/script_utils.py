"""What the scripts share: options from YAML and command line, and errors in one line."""

from __future__ import annotations

import argparse
import difflib
import errno
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import yaml
from torch.optim import SGD
from transformers import HfArgumentParser, TrainingArguments, get_scheduler
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.utils import logging

# The least that these options may be. The Trainer takes less, and fails later or trains nothing.
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "seed": 0,
    "data_seed": 0,
    "max_length": 2,  # of TRL's SFT: of one token nothing is predicted
    "max_completion_length": 1,  # of TRL's GRPO
}
# The options of SAM as --help lists them.
SAM_HEADINGS = {
    "SAM: radius": ("sam_rho", "sam_rho_schedule", "sam_rho_warmup_ratio", "sam_rho_min"),
    "SAM: method": ("sam_method", "sam_method_args", "sam_eta", "sam_adaptive_scope"),
    "SAM: what is perturbed": (
        "sam_params",
        "sam_scope",
        "sam_replay_rng",
        "sam_freeze_norm_stats",
    ),
    "SAM: cost": (
        "sam_interval",
        "sam_start_ratio",
        "sam_ascent_fraction",
        "sam_trigger",
        "sam_trigger_start",
        "sam_trigger_end",
    ),
}
# How the libraries that write checkpoints say that a disk is full: safetensors, then torch.
FULL_DISK = ("No space left on device", "file write failed", ". unexpected pos ")


class InputError(Exception):
    """What the user gave cannot be used. The message says in one line what and why."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def run_script(main: Callable[[list[str] | None], Any], argv: list[str] | None = None) -> None:
    """Run a script's `main`: bad input ends in one line and exit code 2, Ctrl-C in 130.

    A full disk ends in one line and exit code 1.
    """
    # What is left on the screen is for the user: warnings without a line of some library's code,
    # the bar of the training without those of reading and writing files, and each error once.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    getLogger("datasets.packaged_modules").setLevel(CRITICAL)
    try:
        main(argv)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _is_full_disk(error):
            raise
        what = getattr(error, "filename", None) or "the output"
        print(
            f"\n{Path(sys.argv[0]).name}: error: {what} cannot be written: the disk is full; the "
            "checkpoints that were saved before are intact",
            file=sys.stderr,
        )
        sys.exit(1)


def _is_full_disk(error: Exception) -> bool:
    is_out_of_space = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return is_out_of_space or any(words in str(error) for words in FULL_DISK)


def leave_for_missing_package(error: ImportError, extra: str) -> NoReturn:
    """End the script in one line because a package of one of sam_hf's extras is not there."""
    name = Path(sys.argv[0]).name
    print(f"{name}: error: {error}; pip install 'sam-hf[{extra}]'", file=sys.stderr)
    sys.exit(2)


class OptionParser(HfArgumentParser):
    """`HfArgumentParser` that takes a YAML file first, and options after it, which win.

    The YAML's keys are the options' names. Its values go through the same conversion as the
    command line's, so that 1e-3, which YAML 1.1 reads as a string, is the number it looks like.
    """

    def __init__(self, dataclasses: Sequence[type], description: str | None = None) -> None:
        super().__init__(
            dataclasses,
            usage="%(prog)s [config.yaml] [--option value ...]",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # a mistyped option must not pass for the start of another
        )
        self.add_argument("config", nargs="?", help="YAML file with any of the options below.")
        self._actions_by_name = {
            name: next(action for action in self._actions if action.dest == name)
            for dataclass in dataclasses
            for name in (f.name for f in fields(dataclass) if f.init)
        }
        self._sort_groups()

    def _sort_groups(self) -> None:
        """The options of SAM first, those of the Trainer last, each under headings of their own."""
        of_trainer = [f.name for f in fields(TrainingArguments) if f.init]
        headings = {**SAM_HEADINGS, "training (transformers.TrainingArguments)": of_trainer}
        found = {title: list[argparse.Action]() for title in headings}
        title_of = {name: title for title, names in headings.items() for name in names}
        for group in self._action_groups:
            for action in [a for a in group._group_actions if a.dest in title_of]:
                group._group_actions.remove(action)
                found[title_of[action.dest]].append(action)
        first, others = self._action_groups[:2], self._action_groups[2:]
        for title, actions in found.items():
            self.add_argument_group(title)._group_actions[:] = actions
        *of_sam, last = self._action_groups[-len(found) :]
        self._action_groups[:] = [*first, *of_sam, *others, last]

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse(self, argv: list[str] | None = None) -> tuple[Any, ...]:
        """One object per dataclass.

        Raises:
            InputError: an option or a YAML key does not exist, or its value is not allowed.
        """
        given, unknown = self.parse_known_args(argv)
        if unknown:
            self._refuse_unknown(unknown)
        if given.config is not None:
            self.set_defaults(**self._read_yaml(given.config))
        try:
            return self.parse_args_into_dataclasses(argv, look_for_args_file=False)[:-1]
        # A dataclass refused a value, or something that the value needs is not there.
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            raise InputError(error) from error

    def _refuse_unknown(self, unknown: list[str]) -> NoReturn:
        option = next((token for token in unknown if token.startswith("-")), None)
        if option is None:
            raise InputError(f"unexpected argument {unknown[0]!r}: the YAML file, one, comes first")
        option = option.split("=")[0]
        hint = closest(option.lstrip("-").replace("-", "_"), self._actions_by_name, prefix="--")
        raise InputError(f"unknown option {option}{hint}; --help lists all options")

    def _read_yaml(self, file: str) -> dict[str, Any]:
        options = read_yaml(file, "the YAML file")
        if options is None:
            return {}
        if not isinstance(options, dict):
            raise InputError(f"{file} must hold `option: value` lines, got {options!r}")
        return {name: self._convert(file, name, value) for name, value in options.items()}

    def _convert(self, file: str, name: object, value: Any) -> Any:
        """The value as the command line would have given it. argparse leaves it as it is then."""
        action = self._actions_by_name.get(name) if isinstance(name, str) else None
        if action is None:
            raise InputError(f"{file}: unknown key {name!r}{closest(name, self._actions_by_name)}")
        if value is None and action.default is None:
            return None
        if value is None:
            raise InputError(f"{file}: {name} has no value; the default is {action.default!r}")
        if isinstance(value, bool) and action.type is not string_to_bool:
            if action.const is True:  # a flag that also takes text, such as fsdp
                return True if value else action.default
            raise InputError(
                f"{file}: {name} takes no boolean, got {value} (YAML reads yes, no, on and off as "
                "booleans: put such a word in quotes)"
            )
        if isinstance(value, dict) and name == "sam_method_args":
            return {key: _as_number(item) for key, item in value.items()}
        if isinstance(value, dict) and name in TrainingArguments._VALID_DICT_FIELDS:
            return value
        if isinstance(value, dict) or (isinstance(value, list) and action.nargs != "+"):
            raise InputError(f"{file}: {name} takes one value, got {value!r}")
        items = value if isinstance(value, list) else [value]
        if action.type is str and not all(isinstance(item, str) for item in items):
            raise InputError(f"{file}: {name} takes text, got {value!r}: put it in quotes")
        tokens = [f"--{name}", *map(str, items)] if len(items) != 1 else [f"--{name}={items[0]}"]
        try:
            return getattr(self.parse_known_args(tokens)[0], name)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines, and leaves out "(default: None)" and second spellings."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = action.option_strings
        action.option_strings = [s for s in spellings if "-" not in s.lstrip("-")]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _as_number(value: Any) -> Any:
    """1e-3, which YAML 1.1 reads as a string, as the number it looks like."""
    for kind in (int, float) if isinstance(value, str) else ():
        with suppress(ValueError):
            return kind(value)
    return value


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML's own loader lets the last of two equal keys win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} stands there twice")
        return super().construct_mapping(node, deep)


def read_yaml(file: str, what: str) -> Any:
    """The content of a YAML file.

    Args:
        what: the option that names the file, for the error.
    """
    try:
        return yaml.load(Path(file).read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise InputError(f"{what} {file!r} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {error}") from error


def closest(name: object, known: Any, prefix: str = "") -> str:
    """' (did you mean x?)' for the known name that is most like this one, or ''."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {prefix}{match[0]}?)" if match else ""


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse what these scripts would ignore, and what would make their result dishonest.

    Raises:
        InputError: an option is set that has no effect here, or that lets the evaluation data
            choose the model; a number makes no sense; or several processes do not find each other.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if "LOCAL_RANK" in os.environ and started > 1 and args.world_size == 1:
        raise InputError(
            f"{started} processes were started, but there is no GPU for them, and each would train "
            "alone. Give --use_cpu to train together on the CPU"
        )
    _check_numbers(args)
    if args.fp16 and args.device.type == "cpu":
        raise InputError("--fp16 has no effect without a GPU: choose --bf16, or neither")
    if args.max_steps < 1 and args.max_steps != -1:
        raise InputError(
            f"--max_steps must be 1 or more, or -1 to go by the epochs, got {args.max_steps}"
        )
    if args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        raise InputError(f"--num_train_epochs must be above 0, got {args.num_train_epochs}")
    if args.sam_rho > 0 and args.sam_start_ratio == 1:
        raise InputError(
            "--sam_start_ratio 1.0: SAM would never begin; choose less, or turn it off with "
            "--sam_rho 0"
        )
    if args.optim_args and any(pair.count("=") != 1 for pair in args.optim_args.split(",")):
        raise InputError(f"--optim_args must be name=value,name=value, got {args.optim_args!r}")
    if args.label_names is not None:
        raise InputError(f"--label_names {args.label_names}: the script gives the labels a name")
    if args.do_predict:
        raise InputError("--do_predict has no effect: the final model is always evaluated")
    if args.do_eval and not args.do_train and args.eval_strategy == IntervalStrategy.NO:
        raise InputError("--do_eval has no effect alone: the script trains, then evaluates")
    if args.prediction_loss_only or args.batch_eval_metrics:
        name = "prediction_loss_only" if args.prediction_loss_only else "batch_eval_metrics"
        raise InputError(f"--{name} is not supported: the metric needs all predictions at once")
    scheduler = SchedulerType(args.lr_scheduler_type).value
    choosing = {
        "load_best_model_at_end": args.load_best_model_at_end,
        "save_strategy best": args.save_strategy == SaveStrategy.BEST,
        f"lr_scheduler_type {scheduler}": scheduler in ("reduce_lr_on_plateau", "greedy"),
        "metric_for_best_model": args.metric_for_best_model is not None,
    }
    option = next((option for option, is_set in choosing.items() if is_set), None)
    if option is not None:
        raise InputError(
            f"--{option} would choose the model on the data that its score is reported on: the "
            "result is always that of the final model"
        )
    kwargs = args.lr_scheduler_kwargs
    try:  # now, and not when the data has been prepared, as the Trainer does
        optimizer = SGD([torch.zeros(1)], lr=args.learning_rate)
        get_scheduler(scheduler, optimizer, 0, 10**9, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--lr_scheduler_type {scheduler} with --lr_scheduler_kwargs {kwargs!r}: {error}"
        ) from error


def _check_numbers(args: TrainingArguments) -> None:
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name} must be {least} or more, got {value}")
    if not args.max_grad_norm >= 0:  # infinite: measured, and not clipped
        raise InputError(f"--max_grad_norm must be 0 or more, got {args.max_grad_norm}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} must be from 0 to below 1, got {getattr(args, name)}")
    for what in ("save", "eval"):
        steps = getattr(args, f"{what}_steps")
        if getattr(args, f"{what}_strategy") == "steps" and not (steps is None or steps > 0):
            raise InputError(f"--{what}_steps must be above 0, got {steps:g}")


def require_writable(output_dir: str) -> None:
    """Raise `InputError` if nothing can be written to the folder, which need not exist."""
    if not output_dir:
        raise InputError("--output_dir '' is not the name of a folder")
    try:
        is_new = not Path(output_dir).exists()
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:  # permissions tell root nothing
            file.write(b"x")
        if is_new:
            Path(output_dir).rmdir()  # until there is something to write
    except OSError as error:
        raise InputError(f"--output_dir {output_dir!r} cannot be used: {error.strerror}") from error
