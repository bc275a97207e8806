from stillroom.hardware import gpu_names


def test_gpus_are_named_by_their_driver(tmp_path):
    for place, model in (
        ("0000:01", "NVIDIA H100"),
        ("0000:02", "NVIDIA A10"),
        ("0000:03", "NVIDIA A10"),
    ):
        (tmp_path / place).mkdir()
        (tmp_path / place / "information").write_text(f"Model: \t\t {model}\nIRQ:   7\n")
    assert gpu_names(tmp_path) == "NVIDIA A10, NVIDIA H100"


def test_a_driver_that_says_nothing_is_no_error(tmp_path):
    assert gpu_names(tmp_path / "nowhere") == "a GPU"
