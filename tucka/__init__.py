"""Fine-tune pretrained models with Tucker experts.

Each adapted linear layer carries one compact tensor whose slices are low-rank experts, grouped, chosen by a single
router for the whole model, and started from the data (TuckA, arXiv 2511.06859). Importing this package registers the
method with Hugging Face PEFT as peft_type ``TUCKA``.
"""

from importlib.metadata import version

from . import balance, export
from .balance import record_loads
from .config import TuckAConfig
from .diagnosis import doctor
from .export import to_lora
from .initialization import initialize
from .loras import from_loras
from .model import TuckAModel
from .optim import hold_unselected, param_groups
from .ranks import expand, suggest_ranks, truncate
from .recording import pin_route, record_routes
from .registration import register
from .resuming import last_checkpoint
from .revival import revive
from .routing import Route
from .saving import save

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
    "export",
    "from_loras",
    "hold_unselected",
    "initialize",
    "last_checkpoint",
    "param_groups",
    "pin_route",
    "record_loads",
    "record_routes",
    "revive",
    "save",
    "suggest_ranks",
    "to_lora",
    "truncate",
]
