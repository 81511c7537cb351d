"""Releases of bundles: the functions behind `diffboost package`."""

from diffboost.release.twins import json_twin

__all__ = ["json_twin"]
