"""What the tokenizers share: the base class, layers, checks, regularizers and checkpoints."""
