"""Data: preparing and reading question sets, and drawing global batches from them."""

from searchrl.data.errors import DataError
from searchrl.data.packages import fetch_wheel
from searchrl.data.readers import read_examples
from searchrl.data.sampler import Sampler
from searchrl.data.worldfacts import Manifest, build_worldfacts

__all__ = ["DataError", "Manifest", "Sampler", "build_worldfacts", "fetch_wheel", "read_examples"]
