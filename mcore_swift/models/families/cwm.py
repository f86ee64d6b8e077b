"""Code World Model: Llama 3's layers, three of four within a window (arXiv:2510.02387)."""

from mcore_swift.models.families.ministral import Ministral


class Cwm(Ministral):
    name = "cwm"


FAMILY = Cwm()
