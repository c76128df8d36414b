"""Generic torch helpers; knows nothing of GANs or diffusion."""
