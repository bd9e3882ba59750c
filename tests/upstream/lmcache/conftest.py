"""The fixtures of places.py, for all tests here."""

from places import _nothing_left, adapters, azure, parameters, s3

__all__ = ["_nothing_left", "adapters", "azure", "parameters", "s3"]
