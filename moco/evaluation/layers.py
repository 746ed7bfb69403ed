"""Features of several layers of a backbone, from one pass.

Legend: N images, D dimension of all layers together, C channels, T tokens.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

OUTPUT = "output"  # what the backbone itself returns


class LayerFeatures(nn.Module):
    """Images (N, 3, S, S) to the features of the named layers next to each other, (N, D).

    A map (N, C, H, W) is averaged over its places. Of tokens (N, T, C) the class token is taken, as MoCo v3's linear
    probe does, or their mean where the network has none. What has two dimensions already stays as it is.

    Args:
        backbone: the network; put into eval mode, and it keeps the hooks that this sets.
        layers: `output`, or names of submodules as in `backbone.named_modules()`; of one that runs several times in a
            pass the last run counts.
        size: S, for the one blank image that tells the widths.

    Attributes:
        columns: for each layer, in the order asked for, where its features stand.

    Raises:
        ValueError: for a layer that is not there, does not run, or returns nothing that could be averaged.
    """

    def __init__(self, backbone: nn.Module, layers: Sequence[str], size: int) -> None:
        super().__init__()
        self.backbone, self.layers = backbone.eval(), tuple(layers)
        inside = dict(backbone.named_modules())
        unknown = [name for name in self.layers if name != OUTPUT and not (name and name in inside)]
        if unknown:
            raise ValueError(f"layer {unknown[0]!r} is not in the backbone{_names_near(unknown[0], list(inside))}")
        self._caught: dict[str, Any] = {}
        for name in self.layers:
            if name != OUTPUT:
                inside[name].register_forward_hook(lambda _, __, out, name=name: self._caught.__setitem__(name, out))
        # Swin and its like give maps as (N, H, W, C) and say so.
        self._places = (1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else (2, 3)
        self._class_token = getattr(backbone, "num_prefix_tokens", 0) > 0
        parameter = next(backbone.parameters())
        with torch.no_grad():
            blank = parameter.new_zeros(1, 3, size, size)
            widths = [each.shape[1] for each in self._pooled(blank)]
        stops = torch.tensor(widths).cumsum(0).tolist()
        starts = [0, *stops[:-1]]
        self.columns = {name: slice(a, b) for name, a, b in zip(self.layers, starts, stops, strict=True)}
        self.width: int = stops[-1]

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(self._pooled(images), dim=1)  # (N, D)

    def _pooled(self, images: Tensor) -> list[Tensor]:
        self._caught.clear()
        self._caught[OUTPUT] = self.backbone(images)
        missed = [name for name in self.layers if name not in self._caught]
        if missed:
            raise ValueError(f"layer {missed[0]!r} does not run when the backbone does: name another")
        try:
            return [self._pool(name, self._caught[name]) for name in self.layers]
        finally:
            self._caught.clear()  # feature maps are large

    def _pool(self, name: str, out: Any) -> Tensor:
        dims = out.dim() if isinstance(out, Tensor) else 0
        if dims == 4:
            pooled: Tensor = out.mean(dim=self._places)
            return pooled
        if dims == 3:
            tokens: Tensor = out[:, 0] if self._class_token else out.mean(dim=1)
            return tokens
        if dims == 2:
            return out  # type: ignore[no-any-return]
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"layer {name!r} returns {shape}, neither a map nor tokens nor features: name another")


def _names_near(wrong: str, names: list[str], limit: int = 24) -> str:
    """Which names there are: close ones, then the upper levels."""
    close = difflib.get_close_matches(wrong, names, n=1)
    upper = [name for name in names if name and name.count(".") < 2]
    shown = ", ".join([OUTPUT, *upper[:limit]]) + (", ..." if len(upper) > limit else "")
    return (f"; did you mean {close[0]!r}?" if close else "") + f"; there are: {shown}"
