from .attention import attention_by_distance as attention_by_distance
from .diagnosis import diagnose_run as diagnose_run
from .diagnosis import trained_encoding as trained_encoding
from .encoding import describe as describe
from .kernels import training_kernels as training_kernels
