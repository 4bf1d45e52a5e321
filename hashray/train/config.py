"""The training config: what `hashray train CONFIG.toml` reads."""

from __future__ import annotations

import math
import operator
import re
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import BeforeValidator, Field, field_validator, model_validator

from hashray.config import Config, parse_toml, validate
from hashray.data.images import AugmentConfig
from hashray.errors import ConfigError
from hashray.methods import known_methods, parse_method_config
from hashray.methods.backbone import BackboneConfig
from hashray.methods.base import MethodConfig
from hashray.storage import read_url


def _check_method(data: Any) -> Any:
    try:
        return parse_method_config(data)
    except ConfigError as error:
        raise ValueError(str(error)) from error


if TYPE_CHECKING:
    AnyMethodConfig = MethodConfig
else:
    AnyMethodConfig = Annotated[
        reduce(operator.or_, (config for config, _ in known_methods().values())), BeforeValidator(_check_method)
    ]


class OptimConfig(Config):
    """Optimiser and learning-rate schedule; one schedule per phase of the method."""

    name: Literal["adamw", "adam", "sgd"] = Field("adamw", description="Optimiser; sgd has Nesterov momentum")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate of the new layers")
    trunk_lr_factor: float = Field(
        1.0,
        gt=0,
        description="Learning rate of the trunk over that of the new layers; the papers take 0.1 for a pretrained one",
    )
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay of all weights but codewords")
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum of sgd")
    schedule: Literal["cosine", "step", "inverse_time"] = Field(
        "cosine",
        description="Schedule of the rate; step: times 10^-0.5 every ten epochs; inverse_time: over 1 + 1e-5 x step",
    )
    warmup_share: float = Field(
        0.1, ge=0, lt=1, description="Share of a phase's steps that warm up, with the cosine schedule"
    )
    clip_norm: float | None = Field(None, gt=0, description="Largest norm of the gradient")
    clip_value: float | None = Field(None, gt=0, description="Largest entry of the gradient")


class SelfTrainingConfig(Config):
    """Rounds of pseudo-labels of the unlabelled split (AdaLabelHash section 4; what it leaves open: METHODS 2.5)."""

    rounds: int = Field(3, ge=1, description="Rounds after the first training, which sees labelled rows alone")
    epochs: int | None = Field(None, ge=1, description="Epochs of each round; unset: those of the first training")
    lr_factor: float = Field(1.0, gt=0, description="Learning rate of a round over that of the first training")
    temperature: float | Literal["sqrt_bits", "fitted"] = Field(
        1.0, description="Tau of p = softmax(s / tau): a number, the root of num_bits, or fitted on the validation rows"
    )
    threshold: float = Field(0.95, ge=0, le=1, description="Lowest confidence of an accepted row (delta)")
    balance: float = Field(
        1.0,
        gt=0,
        description="Largest share of a class among the pseudo-labelled rows, over its share of the labelled rows",
    )
    top_classes: int | None = Field(
        None, ge=1, description="Classes set to 1 in each row (k); unset: the mean of the labelled rows"
    )
    bottom_classes: int | None = Field(
        None, ge=0, description="Classes set to 0 in each row (k'); unset: all but three times k"
    )
    most_falls: int = Field(2, ge=1, description="Falls of the validation mAP after which the rounds stop")

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value < math.inf:
            raise ValueError("a temperature is a number above 0")
        return value


class ChangeConfig(Config):
    """Values that replace others after some epoch, such as after = 4 and optim.lr = 1e-3.

    A schedule of population-based training is a list of these (Jaderberg et al. 2017).
    """

    after: int = Field(ge=1, description="Epochs after which the values change, counted over all phases")
    method: dict[str, Any] = Field(
        default_factory=dict, description="New weights of losses; the network stays the same"
    )
    optim: dict[str, Any] = Field(default_factory=dict, description="New rates and bounds")
    augment: dict[str, Any] = Field(default_factory=dict, description="New augmentation of the images")

    @model_validator(mode="after")
    def _something_that_can_change(self) -> ChangeConfig:
        for name in (f"{table}.{key}" for table in CHANGEABLE for key in getattr(self, table)):
            if not can_change(name):
                raise ValueError(f"{name} cannot change while a model trains")
        return self


CHANGEABLE = ("method", "optim", "augment")


USUAL_EPOCHS, LEAST_STEPS = 20, 1000  # of a round, where the config does not set its epochs (docs/TRAINING.md)


def can_change(name: str) -> bool:
    """Whether a value, by its dotted name, may change while a model trains (the network must also stay as it is)."""
    return name.partition(".")[0] in CHANGEABLE and name not in ("method.kind", "method.preset", "optim.name")


class TrainConfig(Config):
    """Train a hashing method on a corpus (or on its cached trunk features)."""

    corpus: str | None = Field(None, description="Corpus, local folder or s3:// url")
    out: str | None = Field(None, description="Folder or s3:// url of the model")
    method: AnyMethodConfig
    backbone: BackboneConfig = Field(default_factory=lambda: BackboneConfig())
    augment: AugmentConfig = Field(default_factory=lambda: AugmentConfig())
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig())
    self_training: SelfTrainingConfig | None = Field(None, description="Table of self-training on the unlabelled split")
    changes: Annotated[tuple[ChangeConfig, ...], tyro.conf.Suppress] = ()
    init: str | None = Field(
        None, description="Trained model of the same method, bits and trunk whose weights are the start"
    )
    pseudo_labels: str | None = Field(None, description="Pseudo-labels whose accepted rows join the training rows")
    unlabelled: bool = Field(
        False,
        description="Whether the unlabelled split joins the training rows, for a method that can use it; "
        "it always does for one without need of labels",
    )
    epochs: int | None = Field(
        None, ge=1, description="Epochs in each round of the method; unset: 20, or as many as give 1,000 steps"
    )
    batch_size: int = Field(128, ge=1, description="Rows of a global batch, for any number of workers")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of weights, order, augmentation and held-out rows")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Number format of the trunk; auto: bf16 if the processor multiplies it natively, else fp32",
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Decay of the moving average of the weights; the average is saved"
    )
    validation_rows: int = Field(500, ge=0, description="Train rows held out for model selection, at most a fifth")
    select_by: Literal["map", "harmonic"] = Field(
        "map",
        description="Score that chooses the weights; harmonic: mean of mAP and of mAP within pseudo-unseen classes",
    )
    validation_every: int = Field(5, ge=1, description="Epochs between two validations")
    checkpoint_every: int = Field(1, ge=1, description="Epochs between two checkpoints")
    checkpoint_steps: int | None = Field(None, ge=1, description="Steps between two checkpoints inside an epoch")
    input: Literal["auto", "memory", "stream"] = Field(
        "auto", description="Place of the training rows; auto: memory below memory_limit_mib, else a stream"
    )
    memory_limit_mib: int = Field(
        1024, ge=1, description="Most MiB of training rows, decoded or as cached features, in each worker"
    )
    shuffle_window: int = Field(16_384, ge=1, description="Most rows shuffled together; 512 MiB of images at most")
    features: str | None = Field(None, description="Cached features of a frozen trunk; unset: inside the corpus")
    workers: int | str = Field(
        1, description="Processes that share each global batch; 2:8 is a group of 2 to 8 that follows the cluster"
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="Logical CPUs of each worker, and threads of its torch")
    gpu: bool = Field(False, description="One GPU for each worker")
    ray: Literal["auto", "always", "never"] = Field(
        "auto", description="Whether workers are Ray's; auto: a short training of one worker runs in this process"
    )
    max_failures: int = Field(3, ge=0, description="Most restarts from the last checkpoint after a lost worker")
    max_bad: float = Field(
        0.05, ge=0, le=1, description="Share of rows that may go to quarantine when a frozen trunk computes features"
    )
    tensorboard: bool = Field(True, description="Whether curves for TensorBoard are written beside the checkpoints")

    @model_validator(mode="after")
    def _frozen_trunks_have_weights(self) -> TrainConfig:
        trains_trunk = known_methods()[self.method.kind][1].trains_trunk
        if trains_trunk and self.backbone.frozen and self.backbone.weights is None:
            raise ValueError("backbone.frozen without backbone.weights would freeze random numbers; name the weights")
        if not trains_trunk and not self.backbone.frozen:
            raise ValueError(
                f"{self.method.kind} trains no trunk: set backbone.frozen = true; features are then computed once"
            )
        return self

    @field_validator("workers")
    @classmethod
    def _fewest_and_most(cls, value: int | str) -> int | str:
        numbers = re.fullmatch(r"(\d+)(?::(\d+))?", str(value))
        fewest, most = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
        if not 1 <= fewest <= most:
            raise ValueError(f"workers = {value!r}: expected a number from 1 on, or fewest and most as in 2:8")
        return fewest if fewest == most else f"{fewest}:{most}"

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        fewest, _, most = str(self.workers).partition(":")
        return int(fewest), int(most or fewest)

    @property
    def fewest_workers(self) -> int:
        """Workers that must be there before a training begins."""
        return self.bounds[0]

    @model_validator(mode="after")
    def _unlabelled_rows_are_of_use(self) -> TrainConfig:
        if self.unlabelled and not known_methods()[self.method.kind][1].uses_unlabelled:
            able = [kind for kind, (_, method) in known_methods().items() if method.uses_unlabelled]
            raise ValueError(f"{self.method.kind} learns nothing from rows without labels; unlabelled is for {able}")
        return self

    @model_validator(mode="after")
    def _rounds_need_class_scores(self) -> TrainConfig:
        if self.self_training is not None and not known_methods()[self.method.kind][1].scores_classes(self.method):
            raise ValueError(f"{self.method.kind} with these settings learns no class scores, self_training needs them")
        return self

    @model_validator(mode="after")
    def _changes_are_in_order(self) -> TrainConfig:
        after = [change.after for change in self.changes]
        if after != sorted(set(after)):
            raise ValueError(f"changes: after = {after}; each comes later than the one before")
        if self.changes and self.self_training is not None:
            raise ValueError("changes are of one training, and self_training is several: give one of the two")
        try:
            self.segments()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def num_epochs(self) -> int:
        """Epochs in each round of the method. `with_epochs` decides them from the rows where `epochs` is unset."""
        assert self.epochs is not None, "with_epochs comes before whatever trains or counts epochs"
        return self.epochs

    def segments(self) -> list[tuple[int, TrainConfig]]:
        """The config of each segment between two changes, and the epoch after which it starts.

        Raises:
            ConfigError: with its changes this is not a config.
        """
        segments = [(0, self.model_copy(update={"changes": ()}))]
        for change in self.changes:
            table = segments[-1][1].model_dump(mode="json")
            table |= {name: {**table[name], **getattr(change, name)} for name in CHANGEABLE}
            segments.append((change.after, validate(type(self), table, f"changes, after {change.after} epochs")))
        return segments

    def validation(self, given: int, train: int) -> tuple[bool, int]:
        """Whether the corpus's own validation rows (`given` many) choose the model, else how many train rows do."""
        if not self.validation_rows:
            return False, 0
        return bool(given), 0 if given else min(self.validation_rows, train // 5)

    @property
    def with_unlabelled(self) -> bool:
        """Whether the unlabelled split joins the training rows."""
        return self.unlabelled or not known_methods()[self.method.kind][1].needs_labels

    def result_of(self) -> dict[str, Any]:
        """The part of the config that the trained weights depend on."""
        places = {"corpus", "out", "features", "workers", "cpus_per_worker", "gpu", "ray", "max_failures", "max_bad"}
        places |= {"init", "pseudo_labels"}  # by what they hold, not by where they are
        pace = {"checkpoint_every", "checkpoint_steps", "memory_limit_mib", "tensorboard", "input"}
        return self.model_dump(mode="json", exclude=places | pace | (set() if self.changes else {"changes"}))


def read_training_config(url: str) -> TrainConfig:
    """Read and validate a training config, TOML, local or on S3.

    Raises:
        InputError: no such file. ConfigError: every fault of the file at once.
    """
    return validate(TrainConfig, parse_toml(read_url(url), url), url)
