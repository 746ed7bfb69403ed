"""A run that starts from a published encoder in place of random weights: `init_from`."""

from pathlib import Path

import torch
from torch import Tensor, nn

from moco.config import ConfigError, TrainConfig, require
from moco.interop.encoder_file import EncoderFile, ForeignFileError, State, build, load_all, read_encoder


def load_initial_weights(config: TrainConfig, method: nn.Module) -> str:
    """Puts the weights of `config.init_from` into the method's encoder and, where it has one, momentum encoder.

    Every weight of the backbone comes from the file, or nothing does. The momentum encoder gets the file's own weights
    where the file has both networks. A head whose shapes do not fit stays as it was drawn; so does all else.

    Args:
        config: of the run; the file is taken at its word `model` where it does not say its network itself.
        method: with the attribute `encoder`, and `momentum_encoder` if it has one.

    Returns:
        A line that says what was taken.

    Raises:
        ConfigError: if the file is not there, or its network is another.
        ForeignFileError, CheckpointError: see `read_encoder` and `load_all`.
    """
    path, model = Path(config.init_from), config.model
    require(path.is_file(), f"init_from={path} does not exist")
    file = _read(path, config, "encoder")
    try:
        own = _read(path, config, "momentum_encoder")
    except ForeignFileError:  # one network only
        own = file
    encoder = method.get_submodule("encoder")
    networks = [(encoder, file)]
    if hasattr(method, "momentum_encoder"):
        networks.append((method.get_submodule("momentum_encoder"), own))
    complaint = f"init_from={path} ({file.layout}: {file.backbone}) does not fit model.backbone={model.backbone}"
    with_head = all(_fits(network.get_submodule("head"), each.head_weights) for network, each in networks)
    for network, each in networks:
        load_all(network.get_submodule("backbone"), each.weights, complaint)
        if with_head:
            load_all(network.get_submodule("head"), each.head_weights, complaint)
    if (file.backbone, file.options) != (model.backbone, model.options):
        _refuse_other_features(config, file, encoder.get_submodule("backbone"))
    head = "does not fit" if file.head_weights else "is not in the file"
    taken = "backbone and head" if with_head else f"backbone; the head {head} and is new"
    key = f"; momentum encoder from {'the same' if own is file else 'its own'} weights" if len(networks) > 1 else ""
    return f"starting from {path} ({file.layout}: {file.backbone}): {taken}{key}"


def _read(path: Path, config: TrainConfig, weights: str) -> EncoderFile:
    try:
        return read_encoder(path, weights)
    except ForeignFileError:  # it may only not say its network
        return read_encoder(path, weights, config.model.backbone, config.model.options)


def _fits(module: nn.Module, weights: State) -> bool:
    def shapes(state: State) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}

    return shapes(module.state_dict()) == shapes(weights)


@torch.no_grad()
def _refuse_other_features(config: TrainConfig, file: EncoderFile, backbone: nn.Module) -> None:
    """Refuses a network that only looks the same by its weights: another number of heads, another padding."""
    device = next(backbone.parameters()).device
    size = config.augment.size
    images = torch.arange(2 * 3 * size**2, dtype=torch.float32, device=device).sin().view(2, 3, size, size)
    training = backbone.training
    try:
        theirs: Tensor = build(file).get_submodule("backbone").to(device)(images)
        ours: Tensor = backbone.eval()(images)
        same = theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= 1e-4 * theirs.abs().max())
    finally:
        backbone.train(training)
    if not same:
        raise ConfigError(
            f"init_from={config.init_from} is a {file.backbone} with options={file.options}, whose features are others "
            f"than those of model.backbone={config.model.backbone} with model.options={config.model.options} and the "
            "same weights: set both as the file says"
        )
