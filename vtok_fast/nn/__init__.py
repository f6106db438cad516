"""``nn.Module`` faces of the ops. One file per op."""
