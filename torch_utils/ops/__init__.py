"""Image operations shared by the networks: upfirdn2d, bias_act, conv2d_resample."""
