"""Sphinx extension: the parts of the documentation that are made from the code.

* The page ``methods/<name>.md`` of an entry of `sam_hf.methods.METHODS` holds the hand-written
  sections of its card; the frame around them comes from the class. The build fails if a method
  has no page.
* On any page, ``<!-- generated: NAME -->`` is replaced by the Markdown of ``PARTS[NAME]``.
"""

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from sam_hf import SAMConfig
from sam_hf.cli.arguments import build_parser
from sam_hf.config.checks import method_options
from sam_hf.distributed.validation import _validate_deepspeed
from sam_hf.methods import METHODS, Method

_NOTE_HEADING = "## When it does not help"
_MARKER = re.compile(r"<!-- generated: (\w+) -->")


# ---- Options ---------------------------------------------------------------------------------


def options() -> str:
    """A section for each field of `SAMConfig`."""
    return "\n".join(
        f"## `{f.name}`\n\n{_sentence(f.metadata['help'])}\n\n"
        f"Type\n: `{_type_name(f)}`\n\nDefault\n: `{f.default!r}`\n\nAllowed\n: {allowed(f.name)}\n"
        for f in fields(SAMConfig)
    )


def allowed(option: str) -> str:
    """The values that an option of SAM may have, as the error for another one gives them."""
    try:
        SAMConfig(**{option: object()})
    except ValueError as error:
        text = str(error).rpartition("Allowed: ")[2].removesuffix(".")
        return re.sub(r"'([^']*)'", r"`\1`", text)
    raise ValueError(f"{option} accepts any value.")


def _type_name(f: Field[Any]) -> str:
    return f.type.__name__ if isinstance(f.type, type) else str(f.type).replace("typing.", "")


def _sentence(help_text: str) -> str:
    """A help text as Markdown: quoted values and names of options become code."""
    text = re.sub(r"'([^'\s]+)'", r"`\1`", help_text).replace("|", r"\|").replace("%%", "%")
    return re.sub(r"(?<![`\w])(sam_\w+)", r"`\1`", text)


# ---- The command line ------------------------------------------------------------------------


def commands() -> str:
    """The help of `sam-hf` and of its subcommands."""
    parser = build_parser()
    subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    parsers = [parser, *(p for action in subparsers for p in action.choices.values())]
    with patch.dict(os.environ, {"COLUMNS": "92", "NO_COLOR": "1"}):
        return "\n".join(f"## {p.prog}\n\n```text\n{p.format_help()}```\n" for p in parsers)


# ---- Methods ---------------------------------------------------------------------------------


def docstring_parts(method: type[Method]) -> dict[str, str]:
    """The docstring of a method: summary, details, and what follows "Paper:", "Cost:", ..."""
    summary, *paragraphs = (inspect.getdoc(method) or "").split("\n\n")
    parts, details = {"summary": summary.strip()}, []
    for paragraph in paragraphs:
        label, colon, text = paragraph.partition(": ")
        if colon and label in ("Paper", "Cost", "Settings"):
            parts[label.lower()] = text
        else:
            details.append(paragraph)
    if missing := {"paper", "cost"} - parts.keys():
        raise ValueError(f"The docstring of {method.__name__} lacks {', '.join(sorted(missing))}.")
    return parts | {"details": "\n\n".join(details)}


def needs_number(name: str) -> bool:
    """Whether the method refuses the automatic radius."""
    return not _is_allowed(lambda: SAMConfig(sam_method=name))


def first_rho(name: str) -> str:
    """The first radius among the settings that the docstring of a method recommends."""
    settings = docstring_parts(METHODS[name])["settings"]
    found = re.search(r"``sam_rho``[a-z ]* ([\d.]+\d|\d)", settings)
    if found is None:
        raise ValueError(f"The settings of {name} recommend no sam_rho, and it needs a number.")
    return found[1]


def passes(name: str) -> str:
    """Forward-backward passes per update with the default options."""
    method = _config(name).build_method()
    return "1" if method.has_one_pass else f"1 + 1/{method.interval}" if method.reuses else "2"


def scopes(name: str) -> str:
    has_both = _is_allowed(lambda: _config(name, sam_scope="micro_batch"))
    return "`batch`, `micro_batch`" if has_both else "`batch`"


def layouts(name: str) -> str:
    config, plugin = _config(name), SimpleNamespace(zero_stage=2)
    found = ["one process", "DDP"]
    found += [] if METHODS[name].needs_adapters else ["FSDP2", "tensor parallelism"]
    found += ["DeepSpeed"] if _is_allowed(lambda: _validate_deepspeed(plugin, config)) else []
    return ", ".join(found)


def methods() -> str:
    """The table of the methods, with links to their cards."""
    rows = []
    for name, method in METHODS.items():
        parts = docstring_parts(method)
        link, memory = f"[`{name}`]({name}.md)", _memory(parts["cost"])
        is_automatic = _yes(not needs_number(name))
        rows.append([link, parts["summary"], passes(name), memory, scopes(name), is_automatic])
    head = ["`sam_method`", "what it does", "passes per update", "memory", "scopes"]
    return _table([*head, "automatic radius"], rows)


def method_pages() -> str:
    """The table of contents of the cards."""
    return "\n".join(["```{toctree}", ":hidden:", "", *METHODS, "```"])


def card(name: str, notes: str) -> str:
    """The page of a method: the frame from its class, and the hand-written sections."""
    if _NOTE_HEADING not in notes:
        raise ValueError(f"docs/methods/{name}.md has no section {_NOTE_HEADING!r}.")
    method, parts = METHODS[name], docstring_parts(METHODS[name])
    title = inspect.getdoc(sys.modules[method.__module__])
    settings = [_rst(_capitalized(parts["settings"]))] if "settings" in parts else []
    if not needs_number(name):
        settings.insert(
            0,
            "Leave `sam_rho` unset: the [automatic radius](../guides/choosing_rho.md) finds it in "
            "the run. A number fixes it.",
        )
    sections = [
        f"# {method.__name__}\n\n{title}\n\n{parts['summary']}",
        "## How to use it",
        _usage(name),
        "## Suggested settings",
        *settings,
        "## Technical details",
        _rst(parts["details"]),
        "## Cost and compatibility",
        _rst(_capitalized(parts["cost"])),
        _compatibility(name),
        notes.strip(),
        "## Attribution",
        _rst(parts["paper"]),
        f"```bibtex\n{method.citation}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _usage(name: str) -> str:
    method, own = METHODS[name], method_options(METHODS[name])
    shared = [f for f in fields(SAMConfig) if f.name.removeprefix("sam_") in _shared(method)]
    arguments = [f'sam_method="{name}"']
    arguments += [f"sam_rho={first_rho(name)}"] if needs_number(name) else []
    arguments += [f"{f.name}={f.default!r}" for f in shared]
    keys = ", ".join(f'"{key}": {f.default!r}' for key, f in own.items())
    arguments += [f"sam_method_args={{{keys}}}"] if own else []
    config = f"SAMConfig({', '.join(arguments)})".replace("'", '"')
    lines = ["```python", "from sam_hf import SAM, SAMConfig, SAMTrainer", ""]
    lines += [f"config = {config}", ""]
    lines += ["trainer = SAMTrainer(model=model, args=args, train_dataset=data, sam_config=config)"]
    if not method.needs_auxiliary:
        lines += ["# or, in a training loop:"]
        lines += ["sam = SAM(model, optimizer, config, accelerator=accelerator)"]
    else:
        lines[1] = lines[1].replace("SAM, ", "")
    lines += ["```"]
    if method.needs_adapters:
        lines += ["", "The model must have LoRA adapters of PEFT (`get_peft_model`)."]
    if own or shared:
        what = "keys of `sam_method_args`" if own else "fields of `SAMConfig`"
        lines += ["", f"Its options are {what}, here at their defaults:", ""]
        values = [(f, _allowed_values(f)) for f in own.values()]
        values += [(f, allowed(f.name)) for f in shared]
        rows = [
            [f"`{f.name}`", f"`{f.default!r}`", permitted, _sentence(f.metadata["help"])]
            for f, permitted in values
        ]
        lines += [_table(["option", "default", "allowed", "meaning"], rows)]
    else:
        lines += ["", "It has no options of its own."]
    return "\n".join(lines)


def _shared(method: type[Method]) -> set[str]:
    """Fields of a method that are filled from fields of `SAMConfig`."""
    return {f.name for f in fields(method)} - method_options(method).keys()


def _allowed_values(f: Field[Any]) -> str:
    words = {"low": "≥", "above": ">", "high": "≤", "below": "<"}
    limits = [f"{words[key]} {limit:g}" for key, limit in f.metadata["limits"].items()]
    choices = [f"`{choice}`" for choice in f.metadata["choices"]]
    return ", ".join(choices or limits or ["`True`, `False`"])


def _compatibility(name: str) -> str:
    method = METHODS[name]
    can_cut = _is_allowed(lambda: _config(name, sam_ascent_fraction=0.5))
    rows = {
        "Forward-backward passes per update": passes(name),
        "[Scopes](../reference/options.md#sam_scope)": scopes(name),
        "[Layouts](../guides/distributed.md)": layouts(name),
        "[Training loop of your own](../guides/own_loop.md)": _yes(not method.needs_auxiliary),
        "[Automatic radius](../guides/choosing_rho.md)": _yes(not needs_number(name)),
        "[`sam_ascent_fraction`](../reference/options.md#sam_ascent_fraction), with a number as "
        "radius": _yes(can_cut),
        "State between updates, saved with checkpoints": _yes(method.has_state),
    }
    return _table(["", ""], [list(row) for row in rows.items()])


def _config(name: str, **options: Any) -> SAMConfig:
    return SAMConfig(sam_method=name, sam_rho=0.1, **options)


def _is_allowed(check: Callable[[], Any]) -> bool:
    try:
        check()
    except ValueError:
        return False
    return True


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _memory(cost: str) -> str:
    """The memory in the first sentence of "Cost: <passes>; <memory>. ..."."""
    first = " ".join(cost.split()).partition(". ")[0]
    return first.rpartition("; ")[2].removesuffix(".")


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rst(text: str) -> str:
    return f"````{{eval-rst}}\n{text}\n````"


# ---- Sphinx ----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], str]] = {
    "options": options,
    "commands": commands,
    "methods": methods,
    "method_pages": method_pages,
}


def complete(docname: str, text: str) -> str:
    """The source of a page with its generated parts."""
    folder, _, name = docname.rpartition("/")
    if folder == "methods" and name in METHODS:
        return card(name, text)
    text = text.replace(" ± ", "\u00a0±\u00a0")  # so that a narrow table does not break numbers
    return _MARKER.sub(lambda found: PARTS[found[1]](), text)


def require_pages(docs: Path) -> None:
    """Raise unless every method has its page."""
    if missing := [name for name in METHODS if not (docs / "methods" / f"{name}.md").exists()]:
        pages = ", ".join(f"docs/methods/{name}.md" for name in missing)
        raise FileNotFoundError(f"No page with a section {_NOTE_HEADING!r} for a method: {pages}.")


def _on_source_read(app: Any, docname: str, source: list[str]) -> None:
    text = complete(docname, source[0])
    if text != source[0]:
        source[0] = text
        app.env.note_reread()  # the code may change without the page


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", lambda app: require_pages(Path(app.srcdir)))
    app.connect("source-read", _on_source_read)
    return {"parallel_read_safe": True}
