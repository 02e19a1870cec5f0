"""Trained models and their folders: what addresses a run, what its folder holds, and how it is found."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
