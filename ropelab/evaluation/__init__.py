"""Perplexity of a run or checkpoint far past its training length: plan, targets, losses, intervals, results."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
