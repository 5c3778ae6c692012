"""searchrl: teach language models to search while they reason."""

__version__ = "0.1.0"
