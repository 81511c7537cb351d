"""HED on gray images by Winograd's convolutions: a quarter of the multiplications, same maps."""

import torch
from torch import nn
from torch.nn.functional import interpolate, pad

TILE_PX = 4  # of the output; F(4x4, 3x3)
# Transformed tiles at a time: they stay in a processor's cache. Where a layer has more weights, as
# much as these, for they are read for each chunk.
CHUNK_BYTES = 1 << 22
PASS_PX = 1 << 18  # pixels of a pass: layers of four images of 256 px, or of one of 512 px

# Transforms of a 6 x 6 tile of input, of a kernel and of the products, by rows and by columns.
_INPUT = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
)  # fmt: skip
_KERNEL = (
    (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
)  # fmt: skip
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_CONSTANT = 7  # place (1, 1) of a tile's products: what is added there is added to every output


class Workspace:
    """Memory that layers use in turn: fresh pages for each would cost as much as a convolution."""

    def __init__(self) -> None:
        self.parts: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Float32 of this shape with any content, valid until the name is taken again."""
        size = torch.Size(shape).numel()
        part = self.parts.get(name)
        if part is None or part.numel() < size:
            part = self.parts[name] = torch.empty(size, device=device)
        return part[:size].view(shape)


class WinogradConvolution:
    """A 3x3 convolution with stride 1, its bias and a ReLU, on padded images (B, H, W, C).

    Images stand in a frame of zeros: one pixel above and to the left, and below and to the right
    as many as fill whole tiles and one more.

    Args:
        convolution: weights and bias; padding 1.
        workspace: shared by layers that run one after the other.
        number: in the network; even and odd layers write into different memory.

    Source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
    """

    def __init__(self, convolution: nn.Conv2d, workspace: Workspace, number: int) -> None:
        weight = convolution.weight.detach()
        device, (outputs, inputs) = weight.device, weight.shape[:2]
        kernel = torch.tensor(_KERNEL, dtype=torch.float64)
        weight = torch.einsum("ai,ocij,bj->abco", kernel, weight.cpu().double(), kernel)
        self.weight = weight.reshape(36, inputs, outputs).float().to(device)
        self.bias = convolution.bias.detach()
        self.to_tiles, self.to_outputs = (
            torch.kron(matrix, matrix).to(device)
            for matrix in (torch.tensor(_INPUT).float(), torch.tensor(_OUTPUT).float())
        )
        self.workspace = workspace
        self.name = f"images {number % 2}"

    def __call__(self, framed: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What the convolution makes of framed images, framed.

        Args:
            framed: float32 (B, 4 ceil(H / 4) + 2, 4 ceil(W / 4) + 2, C).
            height, width: H, W.
        """
        batch, (rows, columns) = len(framed), (-(-height // TILE_PX), -(-width // TILE_PX))
        outputs, size = self.weight.shape[2], (batch, *framed.shape[1:3])
        result = self.workspace.take(self.name, (*size, self.weight.shape[2]), framed.device)
        tile_row = 4 * 36 * columns * max(self.weight.shape[1:])  # bytes
        chunk = max(CHUNK_BYTES, 4 * self.weight.numel())
        images = max(1, min(batch, chunk // (tile_row * rows)))
        some = max(1, min(rows, chunk // tile_row))
        for first in range(0, batch, images):
            for row in range(0, rows, some):
                part = slice(TILE_PX * row, min(TILE_PX * (row + some), TILE_PX * rows) + 2)
                tiles = self._transform(framed[first : first + images, part])
                inner = result[first : first + images, part.start + 1 : part.stop - 1, 1:-1]
                target = inner.unflatten(2, (columns, TILE_PX)).unflatten(1, (-1, TILE_PX))
                tiles = tiles.view(TILE_PX, TILE_PX, len(target), -1, columns, outputs)
                torch.clamp(tiles.permute(2, 3, 0, 4, 1, 5), min=0, out=target)
        return clear_frame(result, height, width)

    def _transform(self, framed: torch.Tensor) -> torch.Tensor:
        """Output tiles, (16, tiles x outputs), of a part of the images."""
        batch, height, width, channels = framed.shape
        rows, columns = (height - 2) // TILE_PX, (width - 2) // TILE_PX
        step = framed.stride()
        shape = (6, 6, batch, rows, columns, channels)
        strides = (step[1], step[2], step[0], TILE_PX * step[1], TILE_PX * step[2], 1)
        count, outputs = batch * rows * columns, self.weight.shape[2]
        take, device = self.workspace.take, framed.device
        tiles = take("tiles", shape, device).copy_(
            framed.as_strided(shape, strides, framed.storage_offset())
        )
        turned = take("turned tiles", (36, count * channels), device)
        torch.mm(self.to_tiles, tiles.view(36, -1), out=turned)
        products = take("products", (36, count, outputs), device)
        torch.bmm(turned.view(36, count, channels), self.weight, out=products)
        products[_CONSTANT] += self.bias
        result = take("outputs", (TILE_PX**2, count * outputs), device)
        return torch.mm(self.to_outputs, products.view(36, -1), out=result)


def clear_frame(framed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Sets to zero what is around the images, in place."""
    framed[:, 0] = framed[:, height + 1 :] = 0
    framed[:, :, 0] = framed[:, :, width + 1 :] = 0
    return framed


class GrayHed:
    """controlnet_aux's HED network on gray images, fused: the same maps but for rounding.

    Gray makes three equal channels, whose kernels are added up beforehand; the means that the
    network subtracts stand in a second, constant channel, for zeros are padded after them.

    Args:
        network: ControlNetHED_Apache2 with its weights; not changed.

    Source: engineering choice (issue 6: edges at 0.7 of the peer's time).
    """

    def __init__(self, network: nn.Module) -> None:
        self.workspace = Workspace()
        blocks = [getattr(network, f"block{number}") for number in range(1, 6)]
        first = blocks[0].convs[0]
        weight = first.weight.detach()
        planes = torch.stack([weight.sum(1), -(weight * network.norm.detach()).sum(1)], -1)
        self.first_weight, self.first_bias = planes.flatten(1).T, first.bias.detach()
        convolutions = [list(block.convs)[number == 0 :] for number, block in enumerate(blocks)]
        self.blocks = [
            [
                WinogradConvolution(layer, self.workspace, place)
                for place, layer in enumerate(layers)
            ]
            for layers in convolutions
        ]
        self.sides = [
            (block.projection.weight.detach().flatten(), block.projection.bias.detach())
            for block in blocks
        ]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Fused maps: sigmoid of the mean of the side outputs, each enlarged to the image.

        Args:
            images: float32 (B, 1, H, W) in [-1, 1].

        Returns:
            float32 (B, 1, H, W) in [0, 1].
        """
        some = max(1, PASS_PX // (images.shape[-2] * images.shape[-1]))
        return torch.cat([self._fuse(part) for part in images.split(some)])

    def _fuse(self, images: torch.Tensor) -> torch.Tensor:
        """The maps of one pass."""
        total = torch.zeros_like(images)
        hidden = self._start(images)
        for number, (layers, (weight, bias)) in enumerate(
            zip(self.blocks, self.sides, strict=True)
        ):
            framed = self._shrink(hidden) if number else hidden
            height, width = (side >> number for side in images.shape[-2:])
            for layer in layers:
                framed = layer(framed, height, width)
            hidden = framed[:, 1 : height + 1, 1 : width + 1]
            side = (hidden @ weight + bias)[:, None]
            total += side if number == 0 else interpolate(side, images.shape[-2:], mode="bilinear")
        return torch.sigmoid(total / len(self.sides))

    def _start(self, images: torch.Tensor) -> torch.Tensor:
        """The first layer's framed images, as one product with the 3 x 3 places of two planes."""
        levels = pad((images[:, 0] + 1) * 127.5, (1, 1, 1, 1))
        planes = torch.stack([levels, pad(torch.ones_like(images[:, 0]), (1, 1, 1, 1))], -1)
        batch, _, height, width = images.shape
        step = planes.stride()
        places = planes.as_strided((batch, height, width, 3, 3, 2), (*step[:3], *step[1:3], 1))
        hidden = torch.addmm(self.first_bias, places.reshape(-1, 18), self.first_weight)
        framed, inner = self._frame(batch, height, width, hidden.shape[1], images.device)
        torch.clamp(hidden.view(inner.shape), min=0, out=inner)
        return clear_frame(framed, height, width)

    def _shrink(self, hidden: torch.Tensor) -> torch.Tensor:
        """Images (B, H, W, C) to their maxima in squares of two pixels, framed."""
        batch, height, width, channels = hidden.shape
        height, width = height // 2, width // 2
        rows = torch.maximum(hidden[:, 0 : 2 * height : 2], hidden[:, 1 : 2 * height : 2])
        framed, inner = self._frame(batch, height, width, channels, hidden.device)
        torch.maximum(rows[:, :, 0 : 2 * width : 2], rows[:, :, 1 : 2 * width : 2], out=inner)
        return clear_frame(framed, height, width)

    def _frame(
        self, batch: int, height: int, width: int, channels: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for framed images, and the part inside the frame."""
        size = (-(-side // TILE_PX) * TILE_PX + 2 for side in (height, width))
        framed = self.workspace.take("framed", (batch, *size, channels), device)
        return framed, framed[:, 1 : height + 1, 1 : width + 1]
