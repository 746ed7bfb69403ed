"""Features of several layers of a backbone, from one forward pass.

Legend: N images, S image size, D feature dimension of all layers together, C channels, T tokens.
"""

import difflib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moco.models.first_layer import input_channels

OUTPUT = "output"  # the name of the backbone's own output


class LayerFeatures(nn.Module):
    """A network from images (N, C, S, S) to the concatenated features of the named layers, (N, D).

    Maps (N, C, H, W) are averaged over their positions. Tokens (N, T, C) are represented by the class token, as in MoCo
    v3's linear probe, or, if the network has none, by the mean of the image's tokens (without registers). Outputs
    (N, C) are used unchanged.

    Args:
        backbone: put into eval mode; it keeps the hooks set here.
        layers: `output`, or names of submodules as in `backbone.named_modules()`. If a layer runs several times in a
            forward pass, its last output is used.
        size: S, for one blank image that determines the widths of the features.

    Attributes `columns` (the columns of each layer, in the given order) and `width` (D) describe the result.

    Raises:
        ValueError: for a layer that does not exist, does not run, or returns neither map, tokens nor features.
    """

    def __init__(self, backbone: nn.Module, layers: Sequence[str], size: int) -> None:
        super().__init__()
        self.backbone, self.layers = backbone.eval(), tuple(layers)
        inside = dict(backbone.named_modules())
        unknown = [name for name in self.layers if name != OUTPUT and not (name and name in inside)]
        if unknown:
            raise ValueError(f"layer {unknown[0]!r} is not in the backbone{_suggestions(unknown[0], list(inside))}")
        self._outputs: dict[str, Any] = {}
        for name in self.layers:
            if name != OUTPUT:
                inside[name].register_forward_hook(lambda _, __, out, name=name: self._outputs.__setitem__(name, out))
        # Swin and similar networks return maps (N, H, W, C) and declare it.
        self._positions = (1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else (2, 3)
        self._prefix = getattr(backbone, "num_prefix_tokens", 0)  # class token and registers, before the image's tokens
        self._class_token = self._prefix > 0 and getattr(backbone, "cls_token", None) is not None
        parameter = next(backbone.parameters())
        with torch.no_grad():
            blank = parameter.new_zeros(1, input_channels(backbone), size, size)
            edges = list(accumulate((each.shape[1] for each in self._pooled(blank)), initial=0))
        self.columns = {name: slice(*pair) for name, pair in zip(self.layers, pairwise(edges), strict=True)}
        self.width = edges[-1]

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self._pooled(images), dim=1)  # (N, D)

    def _pooled(self, images: Tensor) -> list[Tensor]:
        self._outputs.clear()
        self._outputs[OUTPUT] = self.backbone(images)
        missed = [name for name in self.layers if name not in self._outputs]
        if missed:
            raise ValueError(f"layer {missed[0]!r} does not run in the backbone's forward pass: choose another")
        try:
            return [self._pool(name, self._outputs[name]) for name in self.layers]
        finally:
            self._outputs.clear()  # feature maps are large

    def _pool(self, name: str, out: Any) -> Tensor:
        if isinstance(out, Tensor):
            if out.dim() == 4:
                return out.mean(dim=self._positions)
            if out.dim() == 3:
                return out[:, 0] if self._class_token else out[:, self._prefix :].mean(dim=1)
            if out.dim() == 2:
                return out
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"layer {name!r} returns {shape}, not a map, tokens or features: choose another")


def _suggestions(wrong: str, names: list[str], limit: int = 24) -> str:
    """List names of layers: a similar name, then the upper levels."""
    close = difflib.get_close_matches(wrong, names, n=1)
    upper = [name for name in names if name and name.count(".") < 2]
    shown = ", ".join([OUTPUT, *upper[:limit]]) + (", ..." if len(upper) > limit else "")
    return (f"; did you mean {close[0]!r}?" if close else "") + f"; available: {shown}"
