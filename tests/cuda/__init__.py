"""The path of a GPU on a machine without one: see `fake_device` and `building`."""
