"""Trainer mixin that publishes the SAM options: config file, model card, Hub, integrations."""

import functools
import inspect
import logging
import shlex
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..compat import upload_exclusions
from ..config import SAMConfig
from ..engine.state import patched
from .model_card import repository_name, update_card

logger = logging.getLogger(__name__)

if TYPE_CHECKING:

    class _Base(Trainer):
        @property
        def sam_config(self) -> SAMConfig: ...
else:
    _Base = object


class PublishingMixin(_Base):
    """Mixin that saves `sam_config.json` and reports the SAM options of a Trainer.

    The model card gets a section and tags, and integrations (`report_to`) see the options among the
    hyperparameters. With `sam_rho=0`, the file replaces that of an earlier run in the folder.
    """

    _sam_saved_in: Path | None = None
    """Folder in which the model was saved last; None if that save failed."""

    @property
    def _sam_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer.train, with the SAM options among the hyperparameters of integrations."""
        original = self.callback_handler.on_train_begin

        def on_train_begin(*args: Any, **kwargs: Any) -> Any:
            with self._sam_hyperparameters():
                return original(*args, **kwargs)

        with patched(self.callback_handler, on_train_begin=on_train_begin):
            return super().train(*args, **kwargs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Trainer.log, with the SAM options among the hyperparameters of integrations."""
        # An evaluation before training sets up the integrations here, not in on_train_begin.
        with self._sam_hyperparameters():
            super().log(*args, **kwargs)

    def _sam_hyperparameters(self) -> AbstractContextManager[None]:
        """Add the SAM options to `args.to_dict()`, from which integrations read hyperparameters."""
        # The attributes of `args` stay unchanged, since checkpoints save them.
        args: Any = self.args
        options = args.to_dict() | self.sam_config.to_sam_dict()
        # Not a closure: callbacks may pickle the arguments.
        return patched(args, to_dict=functools.partial(dict, options))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer.save_model, which also saves `sam_config.json`."""
        folder = self._sam_folder if output_dir is None else Path(output_dir)
        if self.args.should_save:
            self.sam_config.save_pretrained(folder)  # first, since Trainer.save_model may push
        card_before = _read_bytes(folder / "README.md")
        self._sam_saved_in = None
        super().save_model(output_dir, _internal_call)
        self._sam_saved_in = folder
        # PEFT and Sentence Transformers write a model card when they save. A README.md that did
        # not change is the user's own.
        if self.args.should_save and _read_bytes(folder / "README.md") != card_before:
            self._sam_update_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer.create_model_card, with the tags and the section of SAM."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._sam_update_card(self._sam_folder)

    def _sam_update_card(self, folder: Path) -> None:
        card = folder / "README.md"
        try:
            update_card(card, self.sam_config, self)
        except (ValueError, yaml.YAMLError) as error:  # invalid encoding or front matter
            problem = f"{card} cannot be read as a model card, so the SAM section was not updated"
            logger.warning("%s: %s", problem, " ".join(str(error).split()))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer.push_to_hub. After a failure, the error says how to upload the saved model."""
        folder = self._sam_folder
        given = inspect.signature(super().push_to_hub).bind(*args, **kwargs).arguments
        command = self._sam_upload_command(folder, ".", given.get("revision"), given.get("private"))
        try:
            pushed = super().push_to_hub(*args, **kwargs)
        except Exception as error:
            if self.is_world_process_zero():
                if self.hub_model_id is None:  # the Trainer creates the repository before it saves
                    self.save_model(_internal_call=True)
                if self._sam_saved_in == folder:
                    saved = f"Nothing is lost: the model is saved in {str(folder)!r}"
                    error.add_note(f"{saved}. Call push_to_hub() again, or run: {command}")
            raise
        if isinstance(pushed, Future):
            pushed.add_done_callback(functools.partial(_warn_on_failure, command))
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        folder = self._sam_folder
        jobs_before = list(getattr(getattr(self, "push_in_progress", None), "jobs", ()))
        is_due = self.args.hub_always_push or all(job.done() for job in jobs_before)
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and is_due:
            # From the checkpoint, the Trainer copies only its own list of files.
            self.sam_config.save_pretrained(folder)
            self._sam_update_card(folder)
        super()._push_from_checkpoint(checkpoint_folder)

        checkpoint = Path(checkpoint_folder)
        is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
        uploads = ((folder, "."), (checkpoint, "last-checkpoint" if is_last else checkpoint.name))
        jobs = getattr(getattr(self, "push_in_progress", None), "jobs", ())
        new_jobs = [job for job in jobs if job not in jobs_before]
        for job, (source, path) in zip(new_jobs, uploads, strict=False):
            command = self._sam_upload_command(source, path)
            job.add_done_callback(functools.partial(_warn_on_failure, command))

    def _sam_upload_command(
        self, folder: Path, path: str, revision: str | None = None, private: bool | None = None
    ) -> str:
        """Shell command equivalent to a push by the Trainer; `path`: the path in the repository."""
        revision = revision or self.args.hub_revision
        words = ["hf", "upload", repository_name(self), str(folder), path]
        words += upload_exclusions("checkpoint-*", "_*") if path == "." else []
        words += ["--revision", revision] if revision else []
        is_private = self.args.hub_private_repo if private is None else private
        words += ["--private"] if is_private else []
        return shlex.join(words)


def _read_bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _warn_on_failure(command: str, job: Future[Any]) -> None:
    """Log a warning if a push in the background failed, since its error is raised nowhere else."""
    error = None if job.cancelled() else job.exception()
    if error is not None:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        advice = f"Nothing is lost: the files are on disk. To upload them, run: {command}"
        logger.warning("A push to the Hub failed (%s). %s", problem, advice)
