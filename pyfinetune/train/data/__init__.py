"""Files into rows of tokens: sources, formats, tasks, cleaning, splits, mixing, tokens, packing."""
