"""Model families: HF config -> TransformerConfig, layer spec, weight rules."""
