"""Files of weights: read from a folder or S3, parsed, and compared with a network's tensors before they are loaded."""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from hashray import artifact, storage
from hashray.errors import InputError, perhaps

if TYPE_CHECKING:
    from hashray.methods.backbone import BackboneConfig

MODEL_PREFIX = "trunk.net."  # prefix of the trunk's tensors in a trained model
CODE_FILE = "trunk.pt"  # a TorchScript trunk inside a trained model
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # where training scripts put the weights, in timm's
# order of preference


def read_weights(config: BackboneConfig, names: Sequence[str], member: str = "model.safetensors") -> bytes:
    """Read the bytes of a file of weights, or of `member` of a trained model.

    Raises:
        InputError: the file does not exist. The text lists `names`, which would be downloaded.
    """
    path = str(config.weights)
    try:
        store = storage.open_store(path)
        if artifact.is_finished(store):
            return artifact.read_file(store, artifact.load_manifest(store, "model").record(member))
        return storage.read_url(path)
    except InputError as error:
        allowed = ", ".join([*names, "a state-dict file, the folder of a trained model, None"])
        hint = perhaps(path, [*names, "None"])
        fault = f"no such file{hint} Allowed" if hint else "no such file; allowed"
        raise InputError(f"weights = {config.weights!r} for {config.name}: {fault}: {allowed}") from error


def parse_state(path: str, data: bytes) -> Mapping[str, Tensor]:
    """The state dict in the bytes of a file, of torch or safetensors. `path` names it in errors.

    The trunk of a trained model, and the weights in a training script's checkpoint, lose the prefix or the wrapper.

    Raises:
        InputError: the bytes are no state dict.
    """
    try:
        state: Any
        if data[8:9] == b"{":  # safetensors begins with the length of a JSON header, then the header
            state = load_safetensors(data)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # a checkpoint's `args`
                state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} is not a state dict of torch or safetensors: {error}") from error
    if not isinstance(state, Mapping):
        raise InputError(f"{path} holds a {type(state).__name__}; expected a state dict, tensors by name")
    inner: Mapping[str, Any] = next(
        (state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping) and state[key]), state
    )
    if any(str(k).startswith(MODEL_PREFIX) for k in inner):
        return {k.removeprefix(MODEL_PREFIX): v for k, v in inner.items() if k.startswith(MODEL_PREFIX)}
    return {str(k).removeprefix("module."): v for k, v in inner.items()}


def fit(net: nn.Module, state: Mapping[str, Tensor], config: BackboneConfig, unused: tuple[str, ...]) -> None:
    """Load a state dict into a network, whole. Tensors under the prefixes `unused` may be missing or different.

    Raises:
        InputError: keys are unknown, missing or of another shape.
    """
    expected = net.state_dict()
    state = {k: v for k, v in state.items() if not str(k).startswith(unused)}
    wrong = [k for k, v in state.items() if k not in expected or expected[k].shape != getattr(v, "shape", None)]
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    missing = [k for k in missing if not k.startswith(unused)]
    if wrong or missing:
        raise InputError(
            f"{config.weights} does not fit {config.name}: {len(wrong)} keys are unknown or have another shape "
            f"({wrong[:3]}), {len(missing)} keys of the trunk are missing ({missing[:3]}); set the backbone that these "
            "weights are for"
        )
    net.load_state_dict(state, strict=False)
