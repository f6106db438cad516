"""The ops: argument checks, choice of backend, torch.library registration, gradients. A folder per op."""
