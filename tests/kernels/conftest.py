"""Where the kernels of a test run: natively on a GPU, else in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that Triton kernels run on in this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
