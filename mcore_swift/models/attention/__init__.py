"""Core attention for machines without Transformer Engine, on one process and across context-parallel ranks."""

from mcore_swift.models.attention.core import CP_COMM_TYPES, CoreAttention

__all__ = ["CP_COMM_TYPES", "CoreAttention"]
