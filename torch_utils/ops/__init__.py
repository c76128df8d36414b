"""Image operations shared by the networks: upfirdn2d, bias_act, conv3x3, conv2d_resample."""
