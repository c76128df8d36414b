"""Network definitions: the students (StyleGAN2) and the denoisers (EDM), with the parameter names of the published checkpoints."""
