"""What the scripts share: options from YAML and command line, and errors in one line."""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import SchedulerType, get_last_checkpoint
from transformers.utils import logging


class InputError(Exception):
    """What the user gave cannot be used. The message says in one line what and why."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def run_script(main: Callable[[list[str] | None], Any], argv: list[str] | None = None) -> None:
    """Run a script's `main`: bad input ends in one line and exit code 2, Ctrl-C in 130."""
    # What is left on the screen is for the user: warnings without a line of some library's code,
    # and the bar of the training without those of reading and writing files.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.disable_progress_bar()
    try:
        main(argv)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


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
        try:
            options = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a text file"
            raise InputError(f"cannot read the YAML file {file!r}: {reason}") from error
        except yaml.YAMLError as error:
            raise InputError(f"{file} is not valid YAML: {error}") from error
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
    """Keeps the description's lines, and leaves out "(default: None)", which tells nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's own loader lets the last of two equal keys win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} stands there twice")
        return super().construct_mapping(node, deep)


def closest(name: object, known: Any, prefix: str = "") -> str:
    """' (did you mean x?)' for the known name that is most like this one, or ''."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {prefix}{match[0]}?)" if match else ""


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse what these scripts would ignore, and what would make their result dishonest.

    Raises:
        InputError: an option is set that has no effect here, or that lets the evaluation data
            choose the model.
    """
    if args.do_predict:
        raise InputError("--do_predict has no effect: the final model is always evaluated")
    if args.prediction_loss_only or args.batch_eval_metrics:
        name = "prediction_loss_only" if args.prediction_loss_only else "batch_eval_metrics"
        raise InputError(f"--{name} is not supported: the metric needs all predictions at once")
    scheduler = SchedulerType(args.lr_scheduler_type).value
    if args.load_best_model_at_end or scheduler in ("reduce_lr_on_plateau", "greedy"):
        is_best = args.load_best_model_at_end
        option = "load_best_model_at_end" if is_best else f"lr_scheduler_type {scheduler}"
        raise InputError(
            f"--{option} would choose the model on the data that its score is reported on: the "
            "result is always that of the final model"
        )


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint names: a folder, or "last" for the newest.

    Raises:
        InputError: there is none; or there is one, and a fresh run would mix with it.
    """
    asked = args.resume_from_checkpoint
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output_dir {args.output_dir!r} cannot be used: {error.strerror}"
        ) from error
    newest = get_last_checkpoint(args.output_dir)
    if asked is None and newest is not None:
        raise InputError(
            f"--output_dir {args.output_dir!r} holds {Path(newest).name} of an earlier run: go "
            "on from it with --resume_from_checkpoint last, or choose another --output_dir"
        )
    if asked == "last" and newest is None:
        raise InputError(f"--resume_from_checkpoint last: no checkpoint in {args.output_dir!r}")
    if asked not in (None, "last") and not (Path(asked) / "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {asked!r} is neither a checkpoint nor 'last'")
    return newest if asked == "last" else asked
