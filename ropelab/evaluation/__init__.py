"""Perplexity of a run or checkpoint far past its training length: the plan, its targets, losses, intervals, and results."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
