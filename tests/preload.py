"""What the server imports from which the processes of tests are forked (`tests.lab.Process`)."""

import hydra  # noqa: F401
import pytest  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401  what the first optimizer of a process imports, for as long as torch itself takes
from ropelab.experiment import search  # noqa: F401

from ropelab import report  # noqa: F401
from ropelab.analysis import encoding  # noqa: F401
from ropelab.report import figures  # noqa: F401
from ropelab.search import longrope  # noqa: F401
from tests import lab  # noqa: F401
