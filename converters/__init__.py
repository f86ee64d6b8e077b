"""Weights between Hugging Face checkpoints and megatron-core, by the rule tables of `mcore_swift.models`.

    HFReader            regions of a safetensors checkpoint, dequantized where it is quantized
    load.load_hf        Hugging Face checkpoint -> live model, each rank its own slices
    export.export_hf    live model -> Hugging Face checkpoint, each rank its own files
    export.hf_weights   live model -> Hugging Face named tensors, bucket by bucket
    stream              Hugging Face <-> megatron-core checkpoint, without a model
    journal             what a conversion has written, for the next attempt
    verify, layers      logits against transformers; the first layer that differs

Needs no training code, and no process group when there is one process.
"""
