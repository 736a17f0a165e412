"""Options from a YAML file and the command line, and errors in one line."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from errno import ENOSPC
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any, NoReturn

import yaml

# How the libraries that write checkpoints report a full disk: safetensors, then torch.
_FULL_DISK = ("No space left on device", "file write failed", ". unexpected pos ")
_SAM_HEADINGS = {
    "SAM: radius": ["sam_rho", "sam_rho_schedule", "sam_rho_warmup_ratio", "sam_rho_min"],
    "SAM: method": ["sam_method", "sam_method_args", "sam_eta", "sam_adaptive_scope"],
    "SAM: what is perturbed": [
        "sam_params",
        "sam_scope",
        "sam_replay_rng",
        "sam_freeze_norm_stats",
    ],
    "SAM: cost": [
        "sam_interval",
        "sam_start_ratio",
        "sam_ascent_fraction",
        "sam_trigger",
        "sam_trigger_start",
        "sam_trigger_end",
    ],
}


class InputError(Exception):
    """The user's input cannot be used. The message says in one line what and why."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (1e-3, a string in YAML 1.1), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} appears twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(file: str, what: str) -> Any:
    """The content of a YAML file.

    Args:
        what: the option that names the file, for the error.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise InputError(f"{what} {file!r} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {error}") from error


def _exit_with(error: object, status: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    sys.exit(status)


# Before torch and transformers are imported, which takes seconds: `--help` needs no PEFT, which
# transformers imports where it is installed, and a YAML file that cannot be read needs neither.
if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.modules["peft"] = None  # type: ignore[assignment]
    elif len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        try:
            read_yaml(sys.argv[1], "the YAML file")
        except InputError as error:
            _exit_with(error, 2)

from transformers import HfArgumentParser  # noqa: E402
from transformers.hf_argparser import string_to_bool  # noqa: E402
from transformers.utils import logging  # noqa: E402


def run_script(main: Callable[[list[str] | None], Any], argv: list[str] | None = None) -> None:
    """Run a script's `main` with short messages.

    Exit status: 2 after an `InputError`, 130 after Ctrl-C, 1 if the disk is full.
    """
    import datasets

    # No line of library code with a warning; no bars of reading and writing files.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    getLogger("datasets.packaged_modules").setLevel(CRITICAL)  # its errors are raised as well
    try:
        main(argv)
    except InputError as error:
        _exit_with(error, 2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        is_full = getattr(error, "errno", None) == ENOSPC
        if not is_full and not any(words in str(error) for words in _FULL_DISK):
            raise
        what = getattr(error, "filename", None) or "the output"
        saved = "the checkpoints that were saved before are intact"
        _exit_with(f"{what} cannot be written: the disk is full; {saved}", 1)


class OptionParser(HfArgumentParser):
    """`HfArgumentParser` that takes a YAML file first, and options after it, which win."""

    def __init__(self, dataclasses: Sequence[type], description: str | None = None) -> None:
        super().__init__(
            dataclasses,
            usage="%(prog)s [config.yaml] [--option value ...]",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # a mistyped option must not pass for the start of another
        )
        names = {f.name for dataclass in dataclasses for f in fields(dataclass) if f.init}
        self._options = {a.dest: a for a in reversed(self._actions) if a.dest in names}
        self._sort_groups()

    def _sort_groups(self) -> None:
        """List SAM's options first and the Trainer's last, each under its own heading."""
        from transformers import TrainingArguments

        of_trainer = [f.name for f in fields(TrainingArguments)]
        headings = {**_SAM_HEADINGS, "training (transformers.TrainingArguments)": of_trainer}
        title_of = {name: title for title, names in headings.items() for name in names}
        found: dict[str, list[argparse.Action]] = {title: [] for title in headings}
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
        raise InputError(message.removeprefix("argument "))

    def parse(self, argv: list[str] | None = None) -> tuple[Any, ...]:
        """One object per dataclass.

        Raises:
            InputError: an option or a YAML key does not exist, or its value is not allowed.
        """
        tokens = list(sys.argv[1:] if argv is None else argv)
        if tokens and not tokens[0].startswith("-"):
            tokens = self._read_options(tokens[0]) + tokens[1:]
        _, unknown = self.parse_known_args(tokens)
        if unknown:
            option = next((token for token in unknown if token.startswith("-")), None)
            if option is None:
                raise InputError(f"unexpected argument {unknown[0]!r}: a YAML file comes first")
            option = option.split("=")[0]
            hint = closest(option.lstrip("-").replace("-", "_"), self._options, prefix="--")
            raise InputError(f"unknown option {option}{hint}; --help lists all options")
        try:
            return self.parse_args_into_dataclasses(tokens, look_for_args_file=False)
        # A dataclass refused a value, or something that the value needs is not there.
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            raise InputError(error) from error

    def _read_options(self, file: str) -> list[str]:
        """The options of a YAML file as they would stand on the command line."""
        options = read_yaml(file, "the YAML file")
        if not isinstance(options, dict | None):
            raise InputError(f"{file} must hold `option: value` lines, got {options!r}")
        tokens = []
        for name, value in (options or {}).items():
            action = self._options.get(name)
            if action is None:
                raise InputError(f"{file}: unknown key {name!r}{closest(name, self._options)}")
            if value is None and action.default is not None:
                raise InputError(f"{file}: {name} has no value; the default is {action.default!r}")
            if isinstance(value, bool) and action.type is not string_to_bool:
                raise InputError(
                    f"{file}: {name} takes no boolean, got {value} (YAML reads yes, no, on and "
                    "off as booleans: put such a word in quotes)"
                )
            takes_dict = name == "sam_method_args" or name in _dict_options()
            if isinstance(value, dict) and takes_dict:
                value = json.dumps(value)
            if isinstance(value, dict) or (isinstance(value, list) and action.nargs != "+"):
                raise InputError(f"{file}: {name} takes one value, got {value!r}")
            values = value if isinstance(value, list) else [value]
            if len(values) != 1:
                tokens += [f"--{name}", *map(str, values)]
            elif value is not None:
                tokens.append(f"--{name}={values[0]}")
        return tokens


def _dict_options() -> Sequence[str]:
    from transformers import TrainingArguments

    return TrainingArguments._VALID_DICT_FIELDS


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


def closest(name: object, known: Any, prefix: str = "") -> str:
    """' (did you mean x?)' for the known name that is most like this one, or ''."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {prefix}{match[0]}?)" if match else ""
