"""What a run tells others: `sam_config.json`, the model card, the Hub, the reports."""

from __future__ import annotations

import functools
import logging
import shlex
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from .config import SAMConfig
from .model_card import describe, forget, repository_name
from .side_effects import shadowed

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class PublishingMixin(_Base):
    """Saves the options of SAM with the model, and adds them to the card and the reports.

    A run with `sam_rho` 0 saves its `sam_config.json` too, so that none of an earlier run is left
    beside its model; its card is the Trainer's.
    """

    if TYPE_CHECKING:

        @property
        def sam_config(self) -> SAMConfig: ...

    _sam_saved_in: Path | None = None
    """The folder in which the model was saved last."""

    @property
    def _sam_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    # ---- Reports -----------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's `train`. Integrations (`report_to`) see the options of SAM too."""
        begin = self.callback_handler.on_train_begin

        def on_train_begin(*args: Any, **kwargs: Any) -> Any:
            with self._sam_reported():
                return begin(*args, **kwargs)

        with shadowed(self.callback_handler, on_train_begin=on_train_begin):
            return super().train(*args, **kwargs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's `log`. An evaluation before the training starts the integrations here."""
        with self._sam_reported():
            super().log(*args, **kwargs)

    @contextmanager
    def _sam_reported(self) -> Iterator[None]:
        """Options that stand beside the arguments are told with them.

        Integrations read the hyperparameters by `args.to_dict`. The arguments themselves stay as
        they are: they are saved, and the user may go on with them.
        """
        if isinstance(self.args, SAMConfig):
            yield
            return
        to_dict = functools.partial(_to_dict, self.args, self.sam_config.to_sam_dict())
        with shadowed(self.args, to_dict=to_dict):
            yield

    # ---- On disk -----------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's `save_model`, with `sam_config.json` beside the model."""
        folder = self._sam_folder if output_dir is None else Path(output_dir)
        if self.args.should_save:
            self.sam_config.save_pretrained(folder)  # first: what follows may push it
        card_before = _content(folder / "README.md")
        self._sam_saved_in = None
        super().save_model(output_dir, _internal_call)
        self._sam_saved_in = folder
        # PEFT saves a card as well. One that the user wrote stays as it is.
        if self.args.should_save and _content(folder / "README.md") != card_before:
            self._sam_describe(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of the Trainer, with the tags and the section of SAM."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._sam_describe(self._sam_folder)

    def _sam_describe(self, folder: Path) -> None:
        card = folder / "README.md"
        try:
            if self.sam_config.sam_rho > 0:
                describe(card, self.sam_config, self)
            else:
                forget(card)
        except (ValueError, yaml.YAMLError) as error:  # of the encoding, or of the front matter
            logger.warning(
                "%s cannot be read as a model card, and stays without the section of SAM: %s",
                card,
                " ".join(str(error).split()),
            )

    # ---- The Hub -----------------------------------------------------------------------------

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's `push_to_hub`. If it fails, the model is on disk, and the error says so."""
        folder = self._sam_folder
        command = self._sam_upload_command(folder, revision=revision, private=private)
        try:
            pushed = super().push_to_hub(
                commit_message=commit_message,
                blocking=blocking,
                token=token,
                revision=revision,
                private=private,
                **kwargs,
            )
        except Exception as error:
            if self.is_world_process_zero():
                if self.hub_model_id is None:  # the Trainer asks for a repository before it saves
                    self.save_model(_internal_call=True)
                if self._sam_saved_in == folder:
                    error.add_note(
                        f"Nothing is lost: the model is saved in {str(folder)!r}. Call "
                        f"push_to_hub() again, or run: {command}"
                    )
            raise
        if isinstance(pushed, Future):
            self._sam_warn_if_it_fails(pushed, command)
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        folder = self._sam_folder
        jobs_before = self._sam_push_jobs()
        is_due = self.args.hub_always_push or all(job.done() for job in jobs_before)
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and is_due:
            # Of the checkpoint, the Trainer pushes a list of files of its own.
            self.sam_config.save_pretrained(folder)
            self._sam_describe(folder)
        super()._push_from_checkpoint(checkpoint_folder)

        name = Path(checkpoint_folder).name
        path = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else name
        commands = (
            self._sam_upload_command(folder),
            self._sam_upload_command(Path(checkpoint_folder), path),
        )
        new_jobs = [job for job in self._sam_push_jobs() if job not in jobs_before]
        for job, command in zip(new_jobs, commands, strict=False):
            self._sam_warn_if_it_fails(job, command)

    def _sam_push_jobs(self) -> list[Future[Any]]:
        pushing = getattr(self, "push_in_progress", None)
        return [] if pushing is None else list(pushing.jobs)

    def _sam_upload_command(
        self,
        folder: Path,
        path: str = ".",
        revision: str | None = None,
        private: bool | None = None,
    ) -> str:
        """The command that uploads what the Trainer would have uploaded."""
        revision = revision or self.args.hub_revision
        words = ["hf", "upload", repository_name(self), str(folder), path]
        words += ["--exclude", "checkpoint-*", "--exclude", "_*"] if path == "." else []
        words += ["--revision", revision] if revision else []
        # It makes the repository if there is none.
        is_private = self.args.hub_private_repo if private is None else private
        words += ["--private"] if is_private else []
        return shlex.join(words)

    def _sam_warn_if_it_fails(self, job: Future[Any], command: str) -> None:
        job.add_done_callback(functools.partial(_warn_of_a_failed_push, command=command))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _to_dict(args: Any, sam_options: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = type(args).to_dict(args)
    return plain | sam_options


def _warn_of_a_failed_push(job: Future[Any], command: str) -> None:
    """Nobody else looks at what a push in the background raised."""
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.warning(
            "A push to the Hub failed (%s: %s). Nothing is lost: the files are on disk. To upload "
            "them, run: %s",
            type(error).__name__,
            " ".join(str(error).split()),
            command,
        )
