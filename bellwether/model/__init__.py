"""The frozen base model, LoRA layers over it, and generation."""
