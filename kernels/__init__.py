"""The GPU kernels, installed as xgrad_optim.kernels."""
