"""What the tests of this folder run in processes of their own, where `fake_device` is installed before torch is used."""
