"""Models with a head of their own: their rows, their loop and their predictions."""
