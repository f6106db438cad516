"""This machine and this installation, without torch: doctor, known bad pairs, GPUs, the processor."""
