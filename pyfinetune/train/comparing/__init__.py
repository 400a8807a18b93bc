"""Whether fine-tuning was worth it: the tuned model against prompts and other models."""
