"""A trained model as an artifact: weights, what they mean, and their fingerprint. No Ray.

model/  model.safetensors · model.json (method, backbone, classes, num_bits) · metrics.jsonl · manifest.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hashray import __version__, artifact
from hashray.artifact import FileRecord, Manifest, canonical
from hashray.codes import BIT_ORDER, StampedCodes, binarize
from hashray.data.images import to_pixels, to_rgb
from hashray.errors import ConfigError, InputError, MismatchError
from hashray.methods import build_method, parse_method_config
from hashray.methods.backbone import BackboneConfig, Trunk, build_trunk, state_fingerprint, without_place
from hashray.methods.base import Method
from hashray.methods.trunks.custom import TORCHSCRIPT
from hashray.methods.trunks.files import CODE_FILE
from hashray.progress import say
from hashray.storage import Store, open_store

ENCODE_BATCH = 256


class Model:
    """A trained method with its classes; `encode` takes images to codes."""

    def __init__(self, method: Method, classes: Sequence[str], manifest: Manifest, url: str) -> None:
        self.method, self.classes, self.manifest, self.url = method.eval(), list(classes), manifest, url

    @property
    def fingerprint(self) -> str:
        """The hash of everything that its codes depend on."""
        return str(self.manifest.fingerprint)

    @property
    def num_bits(self) -> int:
        return int(self.method.config.num_bits)

    @property
    def backbone(self) -> BackboneConfig:
        return self.method.trunk.config

    def logits(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Logits float32 [n, num_bits] of pixels uint8 [n, 3, s, s] or cached trunk features float32 [n, d]."""
        return self._in_batches(self.method.logits, inputs, self.num_bits)

    def class_scores(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Scores float32 [n, c] of each class, the higher the better, of pixels or features as `logits` takes them.

        Raises:
            InputError: the method has no scores of classes.
        """
        return self._in_batches(self.method.class_scores, inputs, self.method.num_classes)

    def _in_batches(self, compute: Callable[[Tensor], Tensor], inputs: NDArray[Any], width: int) -> NDArray[np.float32]:
        device = self.method.trunk.mean.device
        chunks = [inputs[i : i + ENCODE_BATCH] for i in range(0, len(inputs), ENCODE_BATCH)]
        if not chunks:
            return np.zeros((0, width), dtype=np.float32)
        with torch.inference_mode():
            rows = [compute(torch.tensor(chunk, device=device)).float().cpu() for chunk in chunks]
        return torch.cat(rows).numpy()

    def encode(self, images: Sequence[Image.Image] | NDArray[np.uint8]) -> StampedCodes:
        """Packed codes uint8 [n, num_bits // 8] of PIL images or of an array uint8 [n, h, w, 3].

        The codes carry the model's fingerprint: an index of another model refuses them.

        Raises:
            InputError: the array is of another dtype or shape.
        """
        if isinstance(images, np.ndarray):
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
                raise InputError(f"images are {images.dtype} {images.shape}; expected uint8 [n, h, w, 3] or PIL images")
            images = [Image.fromarray(image) for image in images]
        return self.encode_pixels([self.pixels(image) for image in images])

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """The pixels uint8 [3, s, s] that the trunk sees of an image."""
        return to_pixels(to_rgb(image), self.backbone.image_size, self.backbone.framing)

    def encode_pixels(self, pixels: Sequence[NDArray[np.uint8]]) -> StampedCodes:
        """Packed codes uint8 [n, num_bits // 8] of images as `pixels` gives them, each uint8 [3, s, s]."""
        size = self.backbone.image_size
        array = np.stack(pixels) if len(pixels) else np.zeros((0, 3, size, size), dtype=np.uint8)
        return StampedCodes.stamp(binarize(self.logits(array)), self.fingerprint)


def write_model(
    store: Store,
    method: Method,
    weights: Mapping[str, Tensor],
    classes: Sequence[str],
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    history: Iterable[Mapping[str, Any]],
    info: Mapping[str, Any],
) -> Manifest:
    """Write a model artifact; the manifest last."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    description = {
        "method": method.config.model_dump(mode="json"),
        "backbone": without_place(method.trunk.config).model_dump(mode="json"),
        "num_bits": method.config.num_bits,
        "num_classes": method.num_classes,
        "classes": list(classes),
    }
    trunk = method.trunk
    if trunk.code is not None:
        description["code"] = artifact.sha256_hex(trunk.code)
    files: list[FileRecord] = [
        artifact.write_named(store, "model.safetensors", save_tensors(state)),
        artifact.write_named(store, "model.json", canonical(description)),
        artifact.write_named(store, "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode()),
    ]
    if trunk.code is not None and trunk.config.name == TORCHSCRIPT:
        files.append(artifact.write_named(store, CODE_FILE, trunk.code))
    manifest = Manifest(
        kind="model", project_version=__version__, config=dict(config), parents=dict(parents), files=tuple(files),
        bit_order=BIT_ORDER, fingerprint=fingerprint_of(state, description), info=dict(info),
    )  # fmt: skip
    return artifact.publish(store, manifest)


def fingerprint_of(state: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """What codes depend on: every weight, the method's and the trunk's settings (preprocessing is among them)."""
    settings = {key: description[key] for key in ("method", "backbone", "num_bits", "code") if key in description}
    return state_fingerprint(state, canonical(settings).decode())


def load_model(url: str, endpoint_url: str | None = None, device: str | None = None) -> Model:
    """Open a trained model, local or on S3, its checksums verified. No Ray needed.

    Args:
        device: "cuda", "cpu" …; unset: a GPU where there is one.

    Raises:
        InputError: not there or not finished. CorruptArtifact: a file was changed. MismatchError: newer format.
    """
    store = open_store(url, endpoint_url)
    manifest = artifact.load_manifest(store, "model")
    description = json.loads(artifact.read_file(store, manifest.record("model.json")))
    state = load_tensors(artifact.read_file(store, manifest.record("model.safetensors")))
    scripted = description["backbone"]["name"] == TORCHSCRIPT
    code = artifact.read_file(store, manifest.record(CODE_FILE)) if scripted else None
    try:
        trunk = build_trunk(BackboneConfig.model_validate(description["backbone"]), load_weights=False, code=code)
        _say_if_edited(trunk, description, url)
        method = build_method(parse_method_config(description["method"]), trunk, description["num_classes"])
        method.load_state_dict(state)
    except (RuntimeError, ValidationError, ConfigError) as error:
        fault = " ".join(" ".join(str(error).splitlines()[1:3]).split()) or str(error)
        raise MismatchError(f"{url} was written by another version of hashray: {fault}; train it again") from error
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Model(method.to(target), description["classes"], manifest, store.url)


def _say_if_edited(trunk: Trunk, description: Mapping[str, Any], url: str) -> None:
    """Say that the file of a trunk's function is another one than the model was trained with."""
    if trunk.code is not None and artifact.sha256_hex(trunk.code) != description.get("code"):
        say(
            f"note: the file of {trunk.config.name} has changed since {url} was trained: its codes may differ from "
            "those in an index. Restore the file, or train again"
        )
