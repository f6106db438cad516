"""What each op means, in plain PyTorch: any device, any float dtype, slow and obvious."""
