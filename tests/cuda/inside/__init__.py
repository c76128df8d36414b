"""What the tests of this folder run in processes of their own, with `fake_device` in them before torch is used."""
