"""From a configuration to trained weights: plan (`TrainPlan`), state, record and the loop that a run goes through."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
