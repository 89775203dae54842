"""Training-data selection in deep learning; the names of `datasel_wb.names.PUBLIC`, imported when asked for."""
__version__ = "0.1.0"

import sys

from .names import ROOM_OF
from .names import public as __getattr__
from .names import stand_in

for _room in ("data", "nmt", "viz"):   # rooms of an earlier version
    sys.modules[f"{__name__}.{_room}"] = stand_in(_room)


def __dir__(): return sorted({*globals(), *ROOM_OF})
