"""DSEH: Deep Semantic-preserving and Self-supervised Hashing with a label network (Li et al., IJCAI 2018).

LabNet learns semantic features and codes from label rows alone. ImgNet learns to reproduce both from images. The two
alternate in rounds. LabNet is a function of the label row, so it trains on the distinct rows with their counts. Its
objective over all n x n pairs is exact if a batch holds all distinct rows; else a batch estimates it against all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from hashray.codes import Codes, binarize
from hashray.errors import InputError
from hashray.methods.backbone import Trunk
from hashray.methods.base import LabelTable, Method, MethodConfig, Phase, Term, WorkerGroup
from hashray.methods.losses import (
    PosWeightMode,
    full_precision,
    quantization,
    share_a_class,
    signs,
    weighted_mean,
    weighted_pairwise_likelihood,
)
from hashray.metrics import mean_average_precision

IMAGE_POSITIVE_WEIGHT = 0.999  # w of ImgNet, independent of LabNet's (METHODS 1.3 [C])

BOTH = {"rounds": 3, "semantic_activation": "relu", "label_init_std": 0.01, "label_schedule": "step", "label_batch": 32}
PRESETS: dict[str, dict[str, Any]] = {
    "hashray": {},
    # The authors' TensorFlow code with its setting for NUS-WIDE (METHODS 1.2-1.5 [C]).
    "released": BOTH | {
        "beta": 0.01, "label_hidden": 2048, "label_normalization": "lrn", "label_epochs": 30,
        "label_max_steps": 1_000_000, "bank": "per_sample", "clip_gradients": 1.0,
    },
    # The paper's text: a = 1, beta = 0.005, FC 4096, linear label head.
    "paper": BOTH | {
        "pair_scale": 1.0, "beta": 0.005, "positive_weight": 1.0, "label_head": "linear", "label_hidden": 4096,
        "label_normalization": "none", "logit_scale": 1.0, "target_smooth": 1.0,
    },
}  # fmt: skip


class DSEHConfig(MethodConfig):
    """Settings of DSEH. The weights have the names of the paper: alpha J2, beta J3, gamma J4 (Eq. 11), eta (Eq. 14)."""

    presets = PRESETS
    kind: Literal["dseh"] = "dseh"
    preset: Literal["hashray", "released", "paper"] = Field("hashray", description="Values for every unset field")
    ablation: Literal["none", "S", "SS", "L", "A"] = Field("none", description="Ablation of Table 2, such as DSEH-S")
    rounds: int = Field(2, ge=1, description="Alternations of LabNet and ImgNet; 3 in the released code")
    semantic_weight: float = Field(1.0, ge=0, description="Weight of LabNet's J1; 0 in the released ImageNet setting")
    alpha: float = Field(1.0, ge=0, description="Weight of J2, the pairwise term on codes")
    beta: float = Field(0.01, ge=0, description="Weight of J3, the quantisation term")
    gamma: float = Field(1.0, ge=0, description="Weight of J4, the label prediction")
    eta: float = Field(1.0, ge=0, description="Weight of ImgNet's J2, the code targets")
    pair_scale: float = Field(0.5, gt=0, description="Factor a in theta = a * x . y; 1 in the paper, 1/2 as released")
    positive_weight: float = Field(0.999, gt=0, description="Weight w of similar pairs in LabNet")
    pos_weight_mode: PosWeightMode = Field("linear", description="Way in which w weighs similar pairs (METHODS 1.3)")
    label_head: Literal["linear", "sigmoid"] = Field("sigmoid", description="LabNet's output; linear in the paper")
    label_hidden: int = Field(2048, gt=0, description="Width of LabNet's first layer; 4096 in the paper")
    semantic_dim: int = Field(512, gt=0, description="Width of the semantic feature")
    semantic_activation: Literal["relu", "linear"] = Field(
        "linear", description="Activation of the semantic feature; relu in the paper"
    )
    label_normalization: Literal["batch", "none", "lrn"] = Field(
        "batch", description="Normalisation in LabNet; batch: of the code, lrn: of the first layer"
    )
    label_init_std: float | None = Field(
        None, description="Standard deviation of LabNet's first weights; unset: torch's default"
    )
    label_epochs: int = Field(2000, ge=1, description="Epochs of LabNet in round 0; later rounds have fewer")
    label_batch: int = Field(256, ge=4, description="Distinct label rows in a step of LabNet")
    label_max_steps: int = Field(16_000, ge=1, description="Most steps of LabNet in a round")
    # Measured: 3e-3 merged 5 of 100 one-hot classes and 2e-3 merged some; 1e-3 kept all apart with every seed.
    label_lr: float = Field(1e-3, gt=0, description="Learning rate of LabNet's Adam")
    bank: Literal["dedup", "per_sample"] = Field(
        "dedup", description="Rows of LabNet and its banks: distinct label rows, or every training row as released"
    )
    label_schedule: Literal["one_cycle", "step"] = Field("one_cycle", description="LabNet's schedule; step as released")
    clip_gradients: float | None = Field(None, gt=0, description="Bound on each entry of LabNet's gradients")
    hash_reads: Literal["semantic", "activated"] = Field(
        "semantic", description="Input of ImgNet's hash layer: fc8 as released, or ReLU(fc8)"
    )
    logit_scale: float = Field(10.0, gt=0, description="Factor on ImgNet's logits before the cross-entropy")
    target_smooth: float = Field(0.999, gt=0, le=1, description="Factor on the code targets of ImgNet's J2")

    @model_validator(mode="after")
    def _bounded_below(self) -> DSEHConfig:
        if self.pos_weight_mode == "linear" and self.positive_weight > 1 and self.semantic_weight:
            raise ValueError(
                f"positive_weight = {self.positive_weight:g} > 1 leaves J1 without a lower bound, so the features "
                'diverge (METHODS 1.3); set pos_weight_mode = "bce", or semantic_weight = 0 as released for ImageNet'
            )
        return self


class LabNet(nn.Module):
    """Label row [n, c] -> semantic feature [n, d], relaxed code tanh [n, K], label prediction [n, c]."""

    def __init__(self, config: DSEHConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.hidden = nn.Linear(num_classes, config.label_hidden)
        self.semantic = nn.Linear(config.label_hidden, config.semantic_dim)
        self.hash = nn.Linear(config.semantic_dim, config.num_bits)
        self.head = nn.Linear(config.num_bits, num_classes)
        self.norm = nn.BatchNorm1d(config.num_bits) if config.label_normalization == "batch" else nn.Identity()
        self.present: Tensor
        self.register_buffer("present", torch.ones(num_classes, dtype=torch.bool))
        if config.label_init_std is not None:
            std = config.label_init_std
            for layer in (self.hidden, self.semantic, self.hash, self.head):
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.normal_(layer.bias, std=std)

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.hidden(labels.to(self.hidden.weight.dtype)))
        if self.config.label_normalization == "lrn":  # METHODS 1.1: radius 2, bias 2, alpha 1e-4, beta 0.75
            x = F.local_response_norm(x[:, :, None], size=5, alpha=5e-4, beta=0.75, k=2.0)[:, :, 0]
        feature = self.semantic(x)
        if self.config.semantic_activation == "relu":
            feature = F.relu(feature)
        code = torch.tanh(self.norm(self.hash(feature)))
        return feature, code, self.head(code)

    @torch.no_grad()
    def codes(self, labels: Any) -> Codes:
        """Packed codes uint8 [n, K // 8] of label rows uint8 [n, c]."""
        rows = torch.as_tensor(np.asarray(labels), device=self.hash.weight.device)
        return binarize(torch.cat([self(chunk)[1] for chunk in rows.split(8192)]))


def label_terms(
    config: DSEHConfig,
    outputs: tuple[Tensor, Tensor, Tensor],
    banks: tuple[Tensor, Tensor],
    labels: Tensor,
    weight: Tensor,
    bank_labels: Tensor,
    bank_weight: Tensor,
) -> dict[str, Tensor]:
    """Weighted terms of L_Lab (Eq. 11) for a batch of distinct label rows against the banks.

    Args:
        outputs: LabNet's feature [b, d], code [b, K] and label prediction [b, c] for `labels`.
        banks: constant features [u, d] and codes [u, K] of all distinct rows.
        labels, weight: label rows [b, c], and the number of training rows behind each, [b].
        bank_labels, bank_weight: the same for all distinct rows, [u, c] and [u].

    Equation: DSEH Eqs. 5, 7, 8, 10.
    Differs: J4 is half the mean square over entries, as in the authors' code; the paper sums.
    """
    feature, code, prediction = outputs
    similarity = share_a_class(labels, bank_labels)
    pair = (similarity, weight, bank_weight, config.pair_scale, config.positive_weight, config.pos_weight_mode)
    terms = {"label_j2": config.alpha * weighted_pairwise_likelihood(code, banks[1], *pair)}
    if config.ablation != "SS" and config.semantic_weight:
        terms["label_j1"] = config.semantic_weight * weighted_pairwise_likelihood(feature, banks[0], *pair)
    terms["label_j3"] = config.beta * weighted_mean(quantization(code, "l1"), weight)
    if config.ablation != "L":
        predicted = torch.sigmoid(prediction) if config.label_head == "sigmoid" else prediction
        square = (predicted - labels.to(predicted.dtype)).square().mean(1)
        terms["label_j4"] = config.gamma * 0.5 * weighted_mean(square, weight)
    return terms


def train_label_network(
    net: LabNet,
    table: LabelTable,
    config: DSEHConfig,
    seed: int,
    round: int = 0,
    banks: tuple[Tensor, Tensor] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Train LabNet in place on the distinct label rows; return the mean terms of the last epoch.

    Args:
        banks: constant sides of the pairs in the first steps: ImgNet's outputs in rounds >= 1 (METHODS 1.5), else
            None for LabNet's outputs. A batch overwrites its rows of the banks with LabNet's outputs.
        progress: called with the epochs that are done and their number.

    Raises:
        InputError: all rows have the same labels.
    """
    device = net.hash.weight.device
    rows = table.rows.to(device)
    weight = table.counts.to(device).float()
    if len(rows) < 2:
        raise InputError("all training rows have the same labels, so codes have nothing to tell apart; add classes")
    with torch.no_grad():
        bank_feature, bank_code = (bank.clone() for bank in banks or net.eval()(rows)[:2])
    net.train()
    batches = math.ceil(len(rows) / config.label_batch)
    epochs, optimizer, schedule = _label_schedule(net, config, batches, round)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, float] = {}
    for epoch in range(epochs):
        progress(epoch, epochs)
        for index in torch.randperm(len(rows), generator=generator).to(device).tensor_split(batches):
            outputs = net(rows[index])
            bank_feature[index], bank_code[index] = outputs[0].detach(), outputs[1].detach()
            terms = label_terms(config, outputs, (bank_feature, bank_code), rows[index], weight[index], rows, weight)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()
            if config.clip_gradients is not None:
                nn.utils.clip_grad_value_(net.parameters(), config.clip_gradients)
            optimizer.step()
            schedule.step()
            for name, term in terms.items() if epoch == epochs - 1 else ():
                sums[name] = sums.get(name, 0.0) + float(term.detach()) / batches
    net.eval()
    return sums


def _label_schedule(
    net: LabNet, config: DSEHConfig, batches: int, round: int
) -> tuple[int, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """LabNet's epochs in a round of `batches` batches an epoch, its optimizer and its schedule by step."""
    epochs = min(config.label_epochs, config.label_max_steps // batches)
    if config.label_schedule == "one_cycle":
        epochs = max(1, epochs >> round)
        optimizer = torch.optim.Adam(net.parameters(), lr=config.label_lr)
        steps = epochs * batches + 1
        return epochs, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, config.label_lr, total_steps=steps)
    # METHODS 1.5: rounds of 30, 20 and 10 epochs, with a factor 10^-0.5 after every ten epochs and every round.
    stages = max(1, 3 - round)
    epochs = max(1, epochs * stages // 3)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.label_lr * 10 ** (-0.5 * round))
    steps = max(1, epochs * batches // stages)
    return epochs, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, steps, gamma=10**-0.5)


def label_scores(net: LabNet, table: LabelTable) -> dict[str, float]:
    """n_h and map_l of Table 2 on the training rows. Distinct label rows query all rows, a draw of 2,000 of more."""
    rows, counts, query = table.rows.cpu().numpy(), table.counts.cpu().numpy(), table.drawn(2000).numpy()
    codes = net.codes(rows)
    score = mean_average_precision(codes[query], rows[query], codes.repeat(counts, 0), rows.repeat(counts, 0))
    return {"label_rows": float(len(rows)), "label_n_h": float(len(np.unique(codes, axis=0))), "label_map": score}


def fit_label_network(labels: Any, config: DSEHConfig, seed: int = 0) -> LabNet:
    """Train LabNet from a label matrix alone, without images, as for map_l and n_h of the paper's Table 2.

    Args:
        labels: multi-hot uint8 [n, c].
        seed: seed of the first weights and of the batch order. The global generator does not change.

    Returns the network. Its `.codes(labels)` returns packed codes uint8 [n, num_bits // 8].

    Raises:
        InputError: there are no rows or no classes, an entry is neither 0 nor 1, or all rows have the same labels.
    """
    table = LabelTable.of(torch.as_tensor(np.asarray(labels)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LabNet(config, table.rows.shape[1])
    train_label_network(net, table.repeated() if config.bank == "per_sample" else table, config, seed)
    return net


@final
class DSEH(Method):
    """ImgNet (trunk -> linear semantic feature -> linear hash logits) with LabNet beside it.

    Each phase is a round of Algorithm 1. LabNet trains first, in `begin_phase` on the first worker. ImgNet then trains
    against LabNet's features of all distinct label rows and its codes of the batch.

    Differs: unless `bank` is per_sample, the banks of rounds >= 1 hold the mean of ImgNet's features and the majority
        bits of its codes for each distinct label row (METHODS 1.7). LabNet's optimizer restarts in every round.
        A batch overwrites its rows of a bank before the loss reads them (METHODS 1.5). If one batch holds all distinct
        rows, LabNet therefore learns nothing from ImgNet, and a later round only trains both networks longer.
    """

    kind = "dseh"
    config: DSEHConfig
    bank_feature: Tensor
    bank_labels: Tensor
    bank_counts: Tensor
    similar_share: Tensor

    def __init__(self, config: DSEHConfig, trunk: Trunk, num_classes: int) -> None:
        super().__init__(config, trunk, num_classes)
        self.semantic = nn.Linear(trunk.feature_dim, config.semantic_dim)
        self.hash = nn.Linear(config.semantic_dim, config.num_bits)
        self.label_net = LabNet(config, num_classes).requires_grad_(False).eval()
        for name in ("bank_feature", "bank_labels", "bank_counts", "similar_share"):
            self.register_buffer(name, torch.zeros(0), persistent=False)

    def train(self, mode: bool = True) -> DSEH:
        """Set the mode of ImgNet. LabNet trains only in `begin_phase` and else stays in evaluation mode."""
        super().train(mode)
        self.label_net.eval()
        return self

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        rounds = 1 if self.config.ablation == "A" else self.config.rounds
        return tuple(Phase("image", r, epochs, lr_factor=10 ** (-0.5 * r)) for r in range(rounds))

    def begin_phase(self, phase: Phase, table: LabelTable, seed: int, workers: WorkerGroup) -> dict[str, float]:
        from_images = self._image_banks(table, workers) if phase.round > 0 else None

        def train() -> dict[str, float]:
            rows, banks = table.repeated() if self.config.bank == "per_sample" else table, None
            if from_images is not None:
                rows, outputs = from_images
                sizes = [self.config.semantic_dim, self.config.num_bits]
                feature, code = outputs.to(self.hash.weight).split(sizes, dim=1)
                banks = feature, signs(code)
            self.label_net.present.copy_(table.rows.any(0))
            self.label_net.requires_grad_(True)
            try:
                at = phase.round, banks, partial(workers.progress, "epochs of the label network")
                terms = train_label_network(self.label_net, rows, self.config, seed + phase.round, *at)
            finally:
                self.label_net.requires_grad_(False)
            return terms | label_scores(self.label_net, table)

        notes = workers.run_on_first(self.label_net, train)
        self.bind(table)
        return notes

    def _image_banks(self, table: LabelTable, workers: WorkerGroup) -> tuple[LabelTable, Tensor]:
        """The rows of LabNet's next round with ImgNet's feature and code: for every row, or means by label row."""
        was_training = self.training
        self.eval()  # with batch statistics, the banks would depend on the batches of the scan
        if self.config.bank == "per_sample":
            outputs, labels = workers.gather_rows(self._bank_outputs)
            rows = LabelTable.of_each((labels == 1).to(torch.uint8))
        else:
            rows, sums = table, workers.sum_by_group(self._bank_outputs, table.index, len(table.rows))
            outputs = sums / table.counts.cpu()[:, None]
        self.train(was_training)
        return rows, outputs

    def bind(self, table: LabelTable) -> None:
        """Compute the constant side of Eq. 12: LabNet's features of all distinct label rows."""
        device = self.hash.weight.device
        with torch.no_grad():
            self.bank_feature = self.label_net(table.rows.to(device))[0]
        self.bank_labels, self.bank_counts = table.rows.to(device), table.counts.to(device)
        counts = self.bank_counts.double()
        self.similar_share = counts @ share_a_class(table.rows, table.rows).to(counts) @ counts / counts.sum() ** 2

    def loss_terms(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Term]:
        """Equation: DSEH Eqs. 12, 13. Differs: logits times 10 and targets times 0.999, as in the authors' code.

        An unknown label (-1) counts as absent, because LabNet reads label rows without a third value.
        """
        feature, logits = self._image_net(inputs)
        with torch.no_grad():
            target = (self.label_net(labels == 1)[1] >= 0).to(logits.dtype) * self.config.target_smooth
        bits = F.binary_cross_entropy_with_logits(self.config.logit_scale * logits, target, reduction="none")
        terms = {"image_j2": Term.of_mean(self.config.eta * weighted_mean(bits.mean(1), weight), weight)}
        if self.config.ablation not in ("S", "SS"):
            pairs = weighted_pairwise_likelihood(
                feature, self.bank_feature, share_a_class(labels, self.bank_labels), weight, self.bank_counts,
                self.config.pair_scale, IMAGE_POSITIVE_WEIGHT, self.config.pos_weight_mode, self.similar_share,
            )  # fmt: skip
            terms["image_j1"] = Term.of_mean(pairs, weight)
        return terms

    def logits(self, inputs: Tensor) -> Tensor:
        return self._image_net(inputs)[1]

    @classmethod
    def scores_classes(cls, config: DSEHConfig) -> bool:
        """True if J4 is in the loss, because only J4 trains the label head."""
        return config.ablation != "L" and config.gamma > 0

    def class_scores(self, inputs: Tensor) -> Tensor:
        """The output of LabNet's label head for ImgNet's relaxed codes."""
        scores = self.label_net.head(torch.tanh(self.logits(inputs)))
        return scores.masked_fill(~self.label_net.present, -torch.inf)

    def class_codes(self) -> Codes:
        """LabNet's codes of the label rows with a single class."""
        return self.label_net.codes(np.eye(self.num_classes, dtype=np.uint8))

    def _image_net(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        semantic = full_precision(self.semantic(self.trunk(inputs)))
        activated = F.relu(semantic)
        logits = full_precision(self.hash(activated if self.config.hash_reads == "activated" else semantic))
        return (activated if self.config.semantic_activation == "relu" else semantic), logits

    def _bank_outputs(self, inputs: Tensor) -> Tensor:
        feature, logits = self._image_net(inputs)
        return torch.cat([feature, signs(logits)], dim=1)
