"""The training itself: steps, epochs, and the state that goes on after a stop."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from effkernels.engine.images import Failure
from effkernels.export import ExportError, export_model
from effkernels.files import printable, write_text
from effkernels.models import EfficientNet
from effkernels.models.preprocessing import Preprocessing
from effkernels.optimize import convert_sync_batchnorm
from effkernels.train.checkpoint import FILE_NAME, save_checkpoint
from effkernels.train.data import Data
from effkernels.train.evaluation import evaluate
from effkernels.train.loading import Batch, EvaluationExamples, Loaders, TrainingExamples, training_transform
from effkernels.train.log import Log, Record, save_plot
from effkernels.train.network import make_network, meaning_of, network_again
from effkernels.train.optimizers import make_optimizer, make_schedule
from effkernels.train.options import OptionError, TrainOptions
from effkernels.train.processes import Processes
from effkernels.train.random_numbers import seed_for

LOG, PLOT, WEIGHTS, LABELS = "log.jsonl", "plot.png", "model.safetensors", "labels.txt"
FILES = (FILE_NAME, LOG, PLOT, WEIGHTS, LABELS)
"""What a training writes into its folder."""

_DIGITS_SIZE = 32
_SECONDS_OF_SAME_TEXT = 0.5  # reading the loss makes a GPU wait, so not every step does


class TrainingError(RuntimeError):
    """A training that cannot go on; its last checkpoint is whole."""


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Attributes:
        epochs: that are done.
        accuracy, loss: of the images held out, after the last epoch.
        skipped: number of images that could not be read.
        img_size: that the network was trained with.
        problems: files that could not be written, and why.
    """

    epochs: int
    accuracy: float
    loss: float
    skipped: int
    img_size: int
    problems: tuple[str, ...]


class Training:
    """A training of one process, from its start or from a checkpoint.

    Args:
        options: the choices.
        data: of `load_data(options)`.
        processes: of all that train together, joined already.
        device: of this process.
        autocast: dtype of mixed precision; None: none.
        say: gets the messages; of the first process only.
        state: of `read_training`, to go on; None: start.

    Raises:
        OptionError: a choice that the data or the state does not allow.
        CheckpointError, OSError, ImportError: weights that cannot be read, a package that is missing.
        ValueError: a state that does not fit.
    """

    def __init__(
        self,
        options: TrainOptions,
        data: Data,
        *,
        processes: Processes,
        device: torch.device,
        autocast: torch.dtype | None,
        say: Callable[[str], None],
        state: dict[str, Any] | None = None,
    ) -> None:
        self.options = options
        self.data = data
        self.history: list[Record] = []
        self._processes = processes
        self._device = device
        self._amp = autocast
        self._say = say if processes.is_first else _say_nothing
        self._folder = Path(options.output)
        self._epoch = self._step = 0
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._skipped: dict[str, str] = {}
        self._problems: dict[str, str] = {}
        self._is_resumed = state is not None

        if state is None:
            model = make_network(options, len(data.classes), self._say)
        else:
            model = network_again(options, state["meaning"])
        assert model.config is not None
        self._meaning = meaning_of(model)
        size = options.img_size or (_DIGITS_SIZE if options.is_digits else None)
        preprocessing = Preprocessing.of(model.config, size)
        self.img_size = preprocessing.img_size
        if options.sync_bn and device.type != "cuda":
            raise OptionError("sync_bn", True, "PyTorch has such norms on GPUs alone; allowed here: False")
        network: nn.Module = convert_sync_batchnorm(model) if options.sync_bn else model
        # A GPU's convolutions are faster in channels_last; a CPU's training is not.
        layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
        self._model = network.to(device=device, memory_format=layout).train()  # type: ignore[call-overload]
        self._layout = layout
        self._averaged: AveragedModel | None = None
        if options.model_ema_decay is not None:
            average = get_ema_multi_avg_fn(options.model_ema_decay)
            self._averaged = AveragedModel(self._model, multi_avg_fn=average, use_buffers=True)
        self._wrapped = processes.wrapped(self._model, device)

        transform = training_transform(options, preprocessing)
        self._loaders = Loaders(
            options,
            TrainingExamples(data.train, transform, options.seed),
            EvaluationExamples(data.evaluation, preprocessing),
            processes,
            device,
        )
        self._steps = self._loaders.steps
        if self._steps == 0:
            images = self._loaders.images_per_process
            raise OptionError("batch_size", options.batch_size, f"allowed: 2 to {images}, the images of an epoch")
        self._optimizer = make_optimizer(self._model, options)
        self._schedule = make_schedule(self._optimizer, options, self._steps)
        self._scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
        self._criterion = nn.CrossEntropyLoss(label_smoothing=options.smoothing)
        if state is not None:
            self._load(state)
        self._log: Log | None = None

    # ------------------------------------------------------------------------------------------------------- state

    def _state(self, of_processes: list[tuple[list[float], dict[str, str]]]) -> dict[str, Any]:
        state = {
            "options": self.options.to_dict(),
            "classes": list(self.data.classes),
            "images": len(self.data.train.labels),
            "processes": self._processes.count,
            "meaning": self._meaning,
            "epoch": self._epoch,
            "step": self._step,
            "history": self.history,
            "of_processes": of_processes,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        if self._averaged is not None:
            state["model_ema"] = self._averaged.state_dict()
        return state

    def _load(self, state: dict[str, Any]) -> None:
        if state["classes"] != list(self.data.classes) or state["images"] != len(self.data.train.labels):
            images, classes = len(self.data.train.labels), len(self.data.classes)
            raise OptionError(
                "data",
                self.options.data,
                f"{images} images to train with of {classes} classes, and the training began with {state['images']} of "
                f"{len(state['classes'])}",
            )
        if state["processes"] != self._processes.count:
            raise ValueError(
                f"the training began with {state['processes']} processes, and there are {self._processes.count}; "
                f"go on with torchrun --nproc-per-node {state['processes']}"
            )
        self._epoch, self._step = state["epoch"], state["step"]
        self.history = state["history"]
        sums, self._skipped = state["of_processes"][self._processes.rank]
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))
        self._model.load_state_dict(state["model"])
        if self._averaged is not None:
            self._averaged.load_state_dict(state["model_ema"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])

    def _save(self) -> None:
        # Sums and skipped files are each process' own until the epoch ends.
        of_processes = self._processes.gather((self._sums.tolist(), self._skipped))
        if self._processes.is_first:
            self._try(FILE_NAME, lambda: save_checkpoint(self._folder / FILE_NAME, self._state(of_processes)))

    def _try(self, name: str, write: Callable[[], None]) -> None:
        """Write a file. If that fails the training goes on, and the file is tried again at the next occasion."""
        try:
            write()
            self._problems.pop(name, None)
        except (OSError, ExportError) as error:
            self._problems[name] = f"{printable(self._folder / name)}: {getattr(error, 'strerror', None) or error}"
            self._say(f"{self._problems[name]}; the training goes on and tries again")

    # ------------------------------------------------------------------------------------------------------ running

    @property
    def remaining_steps(self) -> int:
        """Steps from here to the end."""
        return max(0, (self.options.epochs - self._epoch) * self._steps - self._step)

    def run(self, advance: Callable[[str], None]) -> Result:
        """Train to the end, and write the files. `advance` is called after every step with a line on it.

        Raises:
            TrainingError: the loss is no finite number any more, or no image can be read.
        """
        if self._processes.is_first:
            if not self._is_resumed:
                for name in FILES:  # of another training; one that is stopped before its first checkpoint leaves none
                    (self._folder / name).unlink(missing_ok=True)
            self._log = Log(self._folder / LOG, self.history)
        try:
            while self._epoch < self.options.epochs:
                self._train_epoch(advance)
        finally:
            self._wrapped = self._model  # see Processes.joined
        if self._processes.is_first:
            self._write_results()
        self._processes.wait()
        last = self.history[-1]
        return Result(
            epochs=self._epoch,
            accuracy=last["accuracy"],
            loss=last["loss"],
            skipped=len(self._skipped),
            img_size=self.img_size,
            problems=tuple(self._problems.values()),
        )

    def _train_epoch(self, advance: Callable[[str], None]) -> None:
        options = self.options
        started = told = time.monotonic()
        first_step, text = self._step, ""
        rate = 0.0
        for batch in self._loaders.epoch(self._epoch, self._step):
            self._skip_all(batch.failures)
            if not len(batch.labels):
                raise TrainingError("no image to train with can be read")
            self._train_step(batch)
            self._step += 1
            now = time.monotonic()
            rate = (self._step - first_step) * options.batch_size * self._processes.count / (now - started)
            if not text or now - told >= _SECONDS_OF_SAME_TEXT:
                told = now
                loss_sum, count = self._sums.tolist()
                text = f"loss {loss_sum / count:.4f}, {rate:.0f} images/s, {_memory(self._device) / 2**30:.2f} GiB"
            advance(f"epoch {self._epoch + 1}/{options.epochs}, {text}")
            if options.checkpoint_steps and self._step % options.checkpoint_steps == 0 and self._step < self._steps:
                self._save()
        self._end_epoch(time.monotonic() - started, rate)

    def _train_step(self, batch: Batch) -> None:
        images = batch.images.to(self._device, non_blocking=True, memory_format=self._layout)
        labels = batch.labels.to(self._device, non_blocking=True)
        torch.manual_seed(seed_for("step", self.options.seed, self._epoch, self._step, self._processes.rank))
        with self._autocast():
            loss = self._criterion(self._wrapped(images), labels)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        if self.options.clip_grad is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), self.options.clip_grad)
        scale = self._scaler.get_scale() if self._scaler.is_enabled() else 1.0
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if not self._scaler.is_enabled() or self._scaler.get_scale() >= scale:  # else the step was left out
            self._schedule.step()
        if self._averaged is not None:
            self._averaged.update_parameters(self._model)
        self._sums += torch.stack([loss.detach() * len(labels), torch.tensor(len(labels), device=self._device)])

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, dtype=self._amp, enabled=self._amp is not None)

    def _end_epoch(self, seconds: float, rate: float) -> None:
        loss_sum, count = self._processes.sum(self._sums).tolist()
        rate_now = self._optimizer.param_groups[0]["lr"]
        evaluation = evaluate(
            self._kept,
            self._loaders.evaluation(),
            device=self._device,
            autocast=self._autocast,
            processes=self._processes,
            skip=lambda failure: self._skip_all([failure]),
        )
        for skipped in self._processes.gather(self._skipped):
            self._skip_all([Failure(file, reason) for file, reason in skipped.items()])
        train_loss = loss_sum / count
        if not evaluation.images:
            raise TrainingError("no image to evaluate with can be read")
        if not (math.isfinite(train_loss) and math.isfinite(evaluation.loss)):
            raise TrainingError(
                f"epoch {self._epoch + 1}: the loss is {train_loss:g}, and {evaluation.loss:g} of the images held out; "
                "a lower --lr, a longer --warmup-epochs or --clip-grad may help"
            )
        self._epoch += 1
        self._step = 0
        self._sums.zero_()
        record = {
            "epoch": self._epoch,
            "train_loss": train_loss,
            "loss": evaluation.loss,
            "accuracy": evaluation.accuracy,
            "lr": rate_now,
            "skipped": len(self._skipped),
            "images_per_second": round(rate, 1),
            "seconds": round(seconds, 2),
            "memory_bytes": _memory(self._device),
        }
        self.history.append(record)
        self._say(
            f"epoch {self._epoch}/{self.options.epochs}: train loss {train_loss:.4f}, loss {evaluation.loss:.4f}, "
            f"accuracy {evaluation.accuracy:.4f}, {rate:.0f} images/s, {record['memory_bytes'] / 2**30:.2f} GiB"
        )
        if self._log is not None:
            log = self._log
            self._try(LOG, lambda: log.add(record))
        self._save()

    @property
    def _kept(self) -> nn.Module:
        """The network that is evaluated and written: the averaged one if there is one."""
        return self._model if self._averaged is None else self._averaged.module

    def _skip_all(self, failures: Sequence[Failure]) -> None:
        for failure in failures:
            if failure.file not in self._skipped:
                self._skipped[failure.file] = failure.reason
                self._say(f"skipped {printable(failure.file)}: {printable(failure.reason)}")

    # ------------------------------------------------------------------------------------------------------ results

    def _write_results(self) -> None:
        self._try(PLOT, self._plot)
        self._try(WEIGHTS, self._write_weights)
        names = [*self.data.classes, *map(str, range(len(self.data.classes), self._meaning["num_classes"]))]
        self._try(LABELS, lambda: write_text(self._folder / LABELS, "".join(f"{name}\n" for name in names)))

    def _plot(self) -> None:
        title = f"{self.options.model} on {Path(self.options.data).name}"
        try:
            save_plot(self._folder / PLOT, self.history, title)
        except ImportError as error:
            self._say(str(error))

    def _write_weights(self) -> None:
        model: EfficientNet = network_again(self.options, self._meaning)
        model.load_state_dict({key: value.cpu() for key, value in self._kept.state_dict().items()})
        export_model(
            model,
            self._folder / WEIGHTS,
            "safetensors",
            batch_size=(1, 2),
            image_size=self.img_size,
            overwrite=True,
        )


def _memory(device: torch.device) -> int:
    """Return the most memory that was in use: of the GPU by PyTorch's allocator, else of this process; in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _say_nothing(message: str) -> None:
    pass
