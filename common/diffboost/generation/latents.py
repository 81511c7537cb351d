"""Shapes of a backbone's latents."""

from diffboost.generation.backbones import load_config


def downsampling(backbone: str) -> int:
    """Side of an image over that of its latent.

    Args:
        backbone: see :func:`diffboost.generation.backbones.resolve_backbone`.

    Source: engineering choice.
    """
    return 2 ** (len(load_config(backbone, "vae")["block_out_channels"]) - 1)


def latent_shape(backbone: str, image_size: int) -> tuple[int, int, int]:
    """Channels, height and width of the latent of a square image.

    Args:
        backbone: see :func:`diffboost.generation.backbones.resolve_backbone`.
        image_size: side of the image, px.

    Raises:
        ValueError: the autoencoder cannot halve such a side as often as it must.

    Source: engineering choice.
    """
    factor = downsampling(backbone)
    if image_size < factor or image_size % factor:
        raise ValueError(
            f"image_size: {image_size}; the autoencoder of backbone {backbone!r} needs a multiple "
            f"of {factor} px"
        )
    side = image_size // factor
    return load_config(backbone, "vae")["latent_channels"], side, side
