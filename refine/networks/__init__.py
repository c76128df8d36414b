"""Network definitions, students (StyleGAN2) and denoisers (EDM), with the parameter names of the published files."""
