"""The only place that knows transformers, peft and trl: adapters over our layers, and swapping kernels into a model."""
