from .longrope import ask as ask
from .longrope import search_longrope as search_longrope
from .longrope import settings as settings
