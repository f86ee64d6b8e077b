"""Code World Model: Llama 3's layers, three out of four with a sliding window (arXiv:2510.02387)."""

from mcore_swift.models.families.ministral import Ministral


class Cwm(Ministral):
    name = "cwm"


FAMILY = Cwm()
