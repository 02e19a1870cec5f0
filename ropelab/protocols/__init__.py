"""The protocols of perplexity, one module each: a class in a module of this package is one, found by its name."""

from ropelab.plugins import registered
from ropelab.protocols.base import Protocol

PROTOCOLS: dict[str, Protocol] = {name: cls() for name, cls in registered(__name__, Protocol).items()}

__all__ = ["PROTOCOLS", "Protocol"]
