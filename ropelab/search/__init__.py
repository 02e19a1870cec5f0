"""LongRoPE's search for the factors of a run, by evolution."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
