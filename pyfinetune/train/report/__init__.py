"""What a run leaves for people: lines, the model card, curves, pages, answers."""
