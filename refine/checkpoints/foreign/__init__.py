"""Files of other programs, one module per format."""
