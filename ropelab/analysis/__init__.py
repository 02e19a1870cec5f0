"""What an encoding says and why a curve bends: its numbers, trained angles, breakdown, attention by distance."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
