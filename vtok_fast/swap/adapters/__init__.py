"""One module per library or kind of layer that accelerate() can swap."""
