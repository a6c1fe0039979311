"""Fine-tune pretrained models with Tucker experts.

Each adapted linear layer carries one compact tensor whose slices are low-rank experts, grouped, chosen by a single
router for the whole model, and started from the data (TuckA, arXiv 2511.06859). Importing this package registers the
method with Hugging Face PEFT as peft_type ``TUCKA``.
"""

from importlib.metadata import version

from . import balance
from .balance import record_loads
from .config import TuckAConfig
from .diagnosis import doctor
from .initialization import initialize
from .model import TuckAModel
from .optim import hold_unselected, param_groups
from .ranks import expand, suggest_ranks, truncate
from .recording import pin_route, record_routes
from .registration import register
from .revival import revive
from .routing import Route

register(TuckAConfig, TuckAModel)

from .apply import apply  # noqa: E402  (last, so that `tucka.apply` is the function and not its module)

__version__ = version("tucka")

__all__ = [
    "Route",
    "TuckAConfig",
    "__version__",
    "apply",
    "balance",
    "doctor",
    "expand",
    "hold_unselected",
    "initialize",
    "param_groups",
    "pin_route",
    "record_loads",
    "record_routes",
    "revive",
    "suggest_ranks",
    "truncate",
]
