"""Published weights: fetched from the Hugging Face hub by its client library, and fitted to a model.

The client library (`huggingface_hub`) downloads, keeps the file in its cache and locks it; its environment variables
(HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN) hold. Only `model.safetensors` is fetched, so nothing
pickled comes from the network.
"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from effkernels._version import __version__
from effkernels.files import printable
from effkernels.models.checkpoint_tensors import CheckpointError
from effkernels.models.checkpoints import Checkpoint, Model, load_read, read_checkpoint
from effkernels.models.config import ModelConfig
from effkernels.models.efficientnet import EfficientNet

FILE_NAME = "model.safetensors"


class HubError(OSError):
    """Published weights could not be fetched and are not in the cache."""


def load_pretrained(
    model: Model,
    weights: ModelConfig,
    *,
    pad_type: str | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
) -> Model:
    """Load published weights into a model that may have another number of classes or of image channels.

    A classifier of another number of classes than the weights' stays as it is initialised. The weights of the first
    convolution are summed over the channels for one channel, and repeated and scaled for any other number but their
    own, as in timm.

    Args:
        model: changed in place.
        weights: the config of the weights, with their `hf_hub_id`.
        pad_type, bn_eps, bn_momentum: as in `effkernels.models.load_checkpoint`.

    Raises:
        ValueError: the model is on the meta device.
        ImportError: huggingface_hub or safetensors is not installed.
        HubError: (an OSError) the file is not in the cache and could not be fetched.
        CheckpointError: the file holds no weights of this model; the model is unchanged.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("pretrained=True needs a device with memory, and device='meta' was asked for")
    file = fetch(weights)
    try:
        checkpoint = read_checkpoint(file)
    except CheckpointError as error:
        # file is FOLDER/snapshots/COMMIT/model.safetensors, a link into FOLDER/blobs: without the link alone, the
        # client would link the same blob again.
        raise CheckpointError(
            f"{error}. It is the cached file of {weights.hf_hub_id}; to have it fetched again, delete "
            f"{printable(file.parents[2])}",
            file=error.file,
            key=error.key,
        ) from error
    checkpoint = _fitted(checkpoint, model, weights)
    return load_read(model, checkpoint, pad_type=pad_type, bn_eps=bn_eps, bn_momentum=bn_momentum)


def fetch(weights: ModelConfig) -> Path:
    """Return the path of published weights in the cache of huggingface_hub, downloaded if they are not there.

    Raises:
        ImportError, HubError: as `load_pretrained`.
    """
    name, repository = weights.full_name, weights.hf_hub_id
    assert repository is not None
    try:
        import safetensors  # noqa: F401
        from huggingface_hub import constants, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"create_model({name!r}, pretrained=True) needs the package {error.name}: pip install 'effkernels[models]'",
            name=error.name,
        ) from error
    try:
        return Path(hf_hub_download(repository, FILE_NAME, library_name="effkernels", library_version=__version__))
    except Exception as error:  # of the client, the HTTP library under it or the file system; it differs by release
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        reason = _first_lines(cause)
        if constants.HF_HUB_OFFLINE:
            reason = f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not have it"
        raise HubError(
            f"create_model({name!r}, pretrained=True): {FILE_NAME} of {repository} could not be fetched: "
            f"{printable(reason)}. Without a network, fetch {hf_hub_url(repository, FILE_NAME)} elsewhere and call "
            f"create_model({name!r}, checkpoint_path=FILE)"
        ) from error


def _first_lines(error: BaseException) -> str:
    """Return the class of an error and the first two lines of its message, which is where the client says it all."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {textwrap.shorten(' '.join(lines[:2]), 300, placeholder=' ...').rstrip('.')}"


def _fitted(checkpoint: Checkpoint, model: Model, weights: ModelConfig) -> Checkpoint:
    """Return the checkpoint with the classifier and the first convolution that the model's ends need."""
    tensors, outside = dict(checkpoint.tensors), checkpoint.layout.outside
    stem = f"{outside['stem']}.weight"
    if stem in tensors:
        tensors[stem] = stem_weight(tensors[stem], model.in_chans)
    if isinstance(model, EfficientNet) and model.num_classes != weights.num_classes:
        for name in ("weight", "bias"):
            tensors.pop(f"{outside['classifier']}.{name}", None)
        own = model.classifier.state_dict()
        tensors |= {f"{outside['classifier']}.{name}": tensor for name, tensor in own.items()}
    return replace(checkpoint, tensors=tensors)


def stem_weight(weight: Tensor, in_chans: int) -> Tensor:
    """Return the weights of a first convolution for another number of image channels.

    Args:
        weight: (O, C, K, K).
        in_chans: of the result: 1: the sum over the C channels, which gives a grey image the values of the same image
            in colour; more: channel i has the weights of channel i % C, times C / in_chans.

    Returns:
        (O, in_chans, K, K), in the dtype of `weight`; `weight` itself where C is in_chans, or where it is of another
        shape.
    """
    if weight.ndim != 4 or weight.shape[1] == in_chans or 0 in weight.shape:
        return weight
    channels, wide = weight.shape[1], weight.float()
    if in_chans == 1:
        return wide.sum(1, keepdim=True).to(weight.dtype)
    source = torch.arange(in_chans) % channels
    return (wide[:, source] * (channels / in_chans)).to(weight.dtype)
