"""Start a run from the encoder of a file instead of random weights: `init_from`."""

from pathlib import Path

import torch
from torch import Tensor, nn

from moco.builder import KeyQueue
from moco.config import ConfigError, TrainConfig, require
from moco.files import absent
from moco.interop.encoder_file import EncoderFile, ForeignFileError, build, is_valid, load_all, read_encoder
from moco.interop.foreign import State
from moco.interop.hub import local_file
from moco.interop.image_size import fit_to_size, with_positions_of
from moco.models.first_layer import input_channels, with_channels_of
from moco.runs.directory import folder_message
from moco.training.checks import warn_of_other_normalization


def initial_file(config: TrainConfig) -> Path:
    """Return the file that `config.init_from` means; raise ConfigError if it does not exist."""
    path = local_file(config.init_from, "init_from")
    if path.is_dir():
        raise ConfigError(folder_message(path, "init_from"))
    require(path.is_file(), f"init_from={path} {absent(path)}")
    return path


def load_initial_weights(config: TrainConfig, method: nn.Module) -> str:
    """Load the weights of `config.init_from` into the encoder and, if there is one, the momentum encoder.

    All weights of the backbone come from the file. The first layer is adapted to another number of channels
    (`moco.models.first_layer.with_channels_of`), and position embeddings are adapted or replaced for another image size
    (`with_positions_of`). The momentum encoder gets its own weights from a file with both networks. A head whose shapes
    differ keeps its random weights. If the head is loaded, the predictor and a full queue of the same size are loaded
    too, because they belong to the head's embedding. No key in the file counts as a key of an image of this run.

    `config.model` describes the network if the file does not.

    Returns:
        A line that reports what was loaded.

    Raises:
        ConfigError: if the file does not exist or holds another network.
        ForeignFileError, CheckpointError: see `read_encoder` and `load_all`.
    """
    path, model = initial_file(config), config.model
    file = _read(path, config, "encoder")
    try:
        momentum_file = _read(path, config, "momentum_encoder")
    except ForeignFileError:  # the file has one network only
        momentum_file = file
    encoder = method.get_submodule("encoder")
    networks = [(encoder, file)]
    if (momentum_encoder := getattr(method, "momentum_encoder", None)) is not None:
        networks.append((momentum_encoder, momentum_file))
    its_name = f": {file.backbone}" if file.backbone != model.backbone else ""
    complaint = f"init_from={path} ({file.layout}{its_name}) does not fit model.backbone={model.backbone}"
    with_head = all(_fits(network.get_submodule("head"), each.head_weights) for network, each in networks)
    for network, each in networks:
        backbone = network.get_submodule("backbone")
        weights, changed = with_channels_of(backbone, with_positions_of(backbone, model.backbone, each.weights))
        load_all(backbone, weights, complaint)
        if with_head:
            load_all(network.get_submodule("head"), each.head_weights, complaint)
    warn_of_other_normalization(config, f"init_from={path}", file.images)
    if (file.backbone, file.options) != (model.backbone, model.options):
        _refuse_other_features(config, file, encoder.get_submodule("backbone"))
    reason = "does not fit" if file.head_weights else "is not in the file"
    loaded = "backbone and head" if with_head else f"backbone; the head {reason} and has random weights"
    source = "the same" if momentum_file is file else "its own"
    momentum = f"; momentum encoder from {source} weights" if len(networks) > 1 else ""
    momentum += f"; {changed}" if changed else ""
    others = _load_predictor(method, file, with_head, complaint) + _load_queue(method, file, with_head)
    others += f"; not used: {', '.join(file.unused)}" if file.unused else ""
    return f"starting from {path} ({file.layout}: {file.backbone}): {loaded}{momentum}{others}"


def _load_predictor(method: nn.Module, file: EncoderFile, with_head: bool, complaint: str) -> str:
    """Load the predictor, if the method has one that fits. Return what to report."""
    predictor: nn.Module | None = getattr(method, "predictor", None)
    wanted = predictor is not None and bool(predictor.state_dict())
    if predictor is not None and wanted and file.predictor and with_head and _fits(predictor, file.predictor):
        load_all(predictor, file.predictor, complaint)
        return "; predictor from the file"
    if file.predictor:
        reason = "it or the head does not fit" if wanted else "the method has none"
        return f"; the predictor in the file is not used ({reason})"
    return "; the predictor is not in the file and has random weights" if wanted else ""


def _load_queue(method: nn.Module, file: EncoderFile, with_head: bool) -> str:
    """Load the queue, if the method has one of the same size. Return what to report."""
    queue: KeyQueue | None = getattr(method, "queue", None)
    keys = file.queue
    if keys is None:
        return ""
    if queue is None:
        problem = "the method has none"
    elif keys.shape != queue.keys.shape:
        problem = f"it is {' x '.join(map(str, keys.shape))}, not {queue.size} x {queue.keys.shape[1]}"
    elif not with_head:
        problem = "the head does not fit"
    elif not is_valid(keys):
        problem = "its keys are not finite numbers"
    else:
        queue.load(keys.roll(-file.oldest, 0))
        return "; queue from the file"
    return f"; the queue in the file is not used ({problem})"


def _read(path: Path, config: TrainConfig, weights: str) -> EncoderFile:
    try:
        return read_encoder(path, weights)
    except ForeignFileError:  # the file may only lack the description of its network
        return read_encoder(path, weights, config.model.backbone, config.model.options)


def _fits(module: nn.Module, weights: State) -> bool:
    ours, theirs = (
        {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}
        for state in (module.state_dict(), weights)
    )
    return ours == theirs


@torch.no_grad()
def _refuse_other_features(config: TrainConfig, file: EncoderFile, backbone: nn.Module) -> None:
    """Refuse a file whose network computes other features with the same weights, e.g. with more attention heads."""
    size, device = config.augment.size, next(backbone.parameters()).device
    their_channels, our_channels = file.channels, input_channels(backbone)
    shown = their_channels if their_channels == our_channels else 1  # 1: gray images, with equal values in all channels
    images = torch.arange(2 * shown * size**2, dtype=torch.float32, device=device).sin().view(2, shown, size, size)
    training = backbone.training
    try:
        theirs: Tensor = (
            build(fit_to_size(file, size, "augment.size"))
            .get_submodule("backbone")
            .to(device)(images.expand(-1, their_channels, -1, -1))
        )
        ours: Tensor = backbone.eval()(images.expand(-1, our_channels, -1, -1))
    finally:
        backbone.train(training)
    if theirs.shape != ours.shape or not bool((theirs - ours).abs().max() <= 1e-4 * theirs.abs().max()):
        raise ConfigError(
            f"init_from={config.init_from} is a {file.backbone} with options={file.options}. With the same weights, "
            f"model.backbone={config.model.backbone} with model.options={config.model.options} computes other "
            "features: set model.backbone and model.options as in the file"
        )
