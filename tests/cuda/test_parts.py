"""Parts of the project on the device that is not there."""


def test_tensors_of_two_devices_are_refused(found):
    refused = found("parts")["refused"]
    assert len(refused) == 2 and all(
        text.startswith("Expected all tensors to be on the same device") for text in refused
    )


def test_waits_and_copies_are_noticed(found):
    noticed = dict(found("parts")["noticed"])
    assert noticed.pop("arithmetic") == 0
    assert all(noticed.values()), noticed


def test_samplers_do_not_wait(found):
    """But for one look at the images of each batch, whether they are finite; noise and labels come from the host."""
    sampled = dict(found("parts")["sampled"])
    drawn = sampled.pop("sample_teacher")
    assert set(map(len, sampled.values())) == {0}, sampled
    assert len([event for event in drawn if event.startswith("wait")]) == 2, drawn
    assert len([event for event in drawn if event.startswith("host to device")]) == 4, drawn
    assert len(drawn) == 6


def test_what_processes_send_each_other_is_on_the_host(found):
    assert found("parts")["sent"] == {"devices": ["cpu"], "same": True, "num": 10}
