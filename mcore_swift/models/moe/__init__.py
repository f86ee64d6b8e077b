"""Mixture of experts: our router, on megatron-core's dispatchers and experts."""
