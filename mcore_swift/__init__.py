"""mcore-swift: Hugging Face checkpoints in, Megatron-core training, Hugging Face checkpoints out."""

__version__ = "0.1.0"
