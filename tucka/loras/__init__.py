"""LoRA adapters as experts.

=============== ==================================================================================
`from_loras`    several LoRA adapters of one base model as the experts of one Tucker adapter
=============== ==================================================================================

`reading` reads and checks their files, `joint` decomposes their updates, `seeding` starts the router from samples of
each, `importing` puts it together, `report` says what came of it.
"""

from .importing import from_loras
from .report import Import, LayerImport
from .seeding import Seeding

__all__ = ["Import", "LayerImport", "Seeding", "from_loras"]
