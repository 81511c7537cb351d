"""The latent diffusion generator: backbones, networks, training draws, sampling, synthesis."""
