"""Releases of bundles: written, and checked by whoever receives one."""
