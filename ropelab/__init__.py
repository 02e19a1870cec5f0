"""ropelab: the referee of position encodings."""

__version__ = "0.1.0"
