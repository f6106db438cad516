"""The ops: argument checks, choice of backend, torch.library registration, gradients. One file per op."""
