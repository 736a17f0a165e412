"""SAM and its variants, one file each. A new method is a new file and a row of `METHODS`."""

from .asam import ASAM
from .base import Dot, Method, State
from .esam import ESAM
from .friendly_sam import FriendlySAM
from .gsam import GSAM
from .looksam import LookSAM
from .lora.bar import BAR
from .lora.bilora import BiLoRA
from .msam import MSAM
from .sam import SAM
from .vasso import VaSSO
from .wsam import WSAM

METHODS: dict[str, type[Method]] = {
    "sam": SAM,
    "asam": ASAM,
    "gsam": GSAM,
    "looksam": LookSAM,
    "wsam": WSAM,
    "friendly_sam": FriendlySAM,
    "vasso": VaSSO,
    "msam": MSAM,
    "esam": ESAM,
    "bilora": BiLoRA,
    "bar": BAR,
}

__all__ = ["METHODS", "Dot", "Method", "State"]
