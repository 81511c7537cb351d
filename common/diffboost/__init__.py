"""DiffBoost: text- and edge-guided diffusion variants that make better segmentation models."""

__version__ = "0.11.0"
