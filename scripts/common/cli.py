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
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any, NoReturn

import yaml

# Before what takes seconds to import: PEFT, which --help does not need, and torch.
if {"-h", "--help"} & set(sys.argv[1:]):
    sys.modules["peft"] = None  # type: ignore[assignment]
elif "".join(sys.argv[1:2]).endswith(".yaml") and not Path(sys.argv[1]).is_file():
    print(f"{Path(sys.argv[0]).name}: error: no YAML file {sys.argv[1]!r}", file=sys.stderr)
    sys.exit(2)

getLogger("bitsandbytes").setLevel(CRITICAL)  # reports what it lacks whenever it is imported
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging

SAM_HEADINGS = {
    "method": "method method_args eta adaptive_scope params scope replay_rng freeze_norm_stats",
    "radius": "rho target_sharpness rho_schedule rho_warmup_ratio rho_min",
    "cost": "interval start_ratio ascent_fraction trigger trigger_start trigger_end",
}


class InputError(Exception):
    """The user's input cannot be used. The message says in one line what and why."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (1e-3, a string in YAML 1.1), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {twice[0]!r} appears twice")
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(file: str, what: str) -> Any:
    """The content of a YAML file; `what` says in an error which file it is."""
    try:
        return yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{what} {file!r} cannot be read: {error}") from error


def run_script(main: Callable[[list[str] | None], Any], argv: list[str] | None = None) -> None:
    """Run a script's `main` with short messages. Exit status: 2 after an `InputError`."""
    import datasets

    # No line of library code with a warning; no bars of reading and writing files.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    getLogger("datasets.packaged_modules").setLevel(CRITICAL)  # its errors are raised as well
    try:
        main(argv)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


class OptionParser(HfArgumentParser):
    """`HfArgumentParser` that takes a YAML file first, and options after it, which win."""

    def __init__(self, dataclasses: Sequence[type], description: str | None = None) -> None:
        super().__init__(
            dataclasses,
            usage="%(prog)s [config.yaml] [--option value ...]",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # a mistyped option must not be taken for a prefix of another
        )
        names = {f.name for dataclass in dataclasses for f in fields(dataclass) if f.init}
        self._options = {a.dest: a for a in reversed(self._actions) if a.dest in names}
        for action in self._actions:
            # Show --learning_rate alone, not --learning-rate too, and no "(default: None)".
            action.option_strings = [s for s in action.option_strings if "-" not in s.lstrip("-")]
            if action.default not in (None, argparse.SUPPRESS):
                action.help = f"{action.help or ''} (default: %(default)s)"
        self._sort_groups(any(issubclass(d, TrainingArguments) for d in dataclasses))

    def _sort_groups(self, has_trainer: bool) -> None:
        """List SAM's options first and the Trainer's last, each under its own heading."""
        first, others = self._action_groups[:2], self._action_groups[2:]
        wanted = {f"SAM: {t}": [f"sam_{n}" for n in v.split()] for t, v in SAM_HEADINGS.items()}
        if has_trainer:
            of_trainer = [f.name for f in fields(TrainingArguments)]
            wanted["training (transformers.TrainingArguments)"] = of_trainer
        own = [self.add_argument_group(title) for title in wanted]
        for group, names in zip(own, wanted.values(), strict=True):
            for other in first + others:
                group._group_actions += [a for a in other._group_actions if a.dest in names]
                other._group_actions[:] = [a for a in other._group_actions if a.dest not in names]
        self._action_groups[:] = [*first, *own[:3], *others, *own[3:]]

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))

    def parse(self, argv: list[str] | None = None) -> tuple[Any, ...]:
        """One object per dataclass, or an InputError for an unknown option or a wrong value."""
        tokens = list(sys.argv[1:] if argv is None else argv)
        if tokens and not tokens[0].startswith("-"):
            tokens = self._read_options(tokens[0]) + tokens[1:]
        _, unknown = self.parse_known_args(tokens)
        if unknown:
            hint = closest(unknown[0].split("=")[0], self._option_string_actions)
            raise InputError(f"unknown option {unknown[0]}{hint}; --help lists all options")
        try:
            return self.parse_args_into_dataclasses(tokens, look_for_args_file=False)
        # A dataclass refused a value, or something that the value needs is missing.
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            raise InputError(error) from error

    def _read_options(self, file: str) -> list[str]:
        """The options of a YAML file as command-line arguments."""
        options = read_yaml(file, "the YAML file")
        if not isinstance(options, dict | None):
            raise InputError(f"{file} must hold `option: value` lines, got {options!r}")
        dicts, tokens = {"sam_method_args", *TrainingArguments._VALID_DICT_FIELDS}, []
        for name, value in (options or {}).items():
            action = self._options.get(name)
            if action is None:
                raise InputError(f"{file}: unknown key {name!r}{closest(name, self._options)}")
            if value is None and action.default is not None:
                raise InputError(f"{file}: {name} has no value; the default is {action.default!r}")
            if isinstance(value, bool) and action.type is not string_to_bool:
                hint = "YAML reads yes, no, on and off as booleans: put such a word in quotes"
                raise InputError(f"{file}: {name} takes no boolean, got {value} ({hint})")
            if isinstance(value, dict) and name in dicts:
                value = json.dumps(value)
            if isinstance(value, dict) or (isinstance(value, list) and action.nargs != "+"):
                raise InputError(f"{file}: {name} takes one value, got {value!r}")
            values = value if isinstance(value, list) else [value]
            if len(values) != 1:
                tokens += [f"--{name}", *map(str, values)]
            elif value is not None:
                tokens.append(f"--{name}={values[0]}")
        return tokens


def closest(name: object, known: Any) -> str:
    """' (did you mean x?)' for the known name that is most like this one, or ''."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""
