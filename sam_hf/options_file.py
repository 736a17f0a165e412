"""`sam_config.json`: reading it from a folder or from the Hub, writing it whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from . import __version__

SAM_CONFIG_NAME = "sam_config.json"


def write_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Write the options, and the version that wrote them, into a folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"sam_hf_version": __version__, **options}
    with replacing(folder / SAM_CONFIG_NAME) as path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_options(
    name_or_path: str | os.PathLike[str], known: Collection[str], **hub: Any
) -> tuple[dict[str, Any], str]:
    """The options in the `sam_config.json` of a folder or of a model on the Hub, not yet checked.

    Args:
        known: the names of the options that there are.
        hub: the keyword arguments of transformers' `cached_file`.

    Returns:
        The options, and a line that says where they come from.

    Raises:
        FileNotFoundError: there is no such file, or the Hub could not be asked for it.
        ValueError: it is no JSON object, or has a key that is no option.
    """
    try:
        file = cached_file(name_or_path, SAM_CONFIG_NAME, **hub)
    except OSError as error:
        raise FileNotFoundError(
            f"{SAM_CONFIG_NAME} could not be read from {str(name_or_path)!r}, which is neither a "
            "folder nor a model on the Hub that holds one: " + " ".join(str(error).split())
        ) from error
    assert file is not None  # else it has raised
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON or of its encoding
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {values!r}. Allowed: a JSON object.")
    version = values.pop("sam_hf_version", "unknown")
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise ValueError(
            f"{file}: {', '.join(map(repr, unknown))} is no option of sam_hf {__version__}. "
            f"The file was written by version {version}: install that one, or remove the key."
        )
    return values, f"The options were read from {file}, written by sam_hf {version}."


def changed_since(folder: Path, options: Mapping[str, Any]) -> list[str]:
    """A line such as "sam_rho was 0.05 and is 0.1" for each option that a checkpoint had otherwise.

    Nothing for a folder without such a file, as other Trainers leave it.
    """
    try:
        before = json.loads((folder / SAM_CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    if not isinstance(before, dict):
        return []
    now = json.loads(json.dumps(options))
    return [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to. When the block ends well, what was written there becomes `path`.

    A block that fails (a full disk) leaves the file of before.
    """
    temporary = path.with_name(f"_{path.name}")  # the Trainer never pushes such names
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
