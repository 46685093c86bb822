import logging
import warnings

import pytest

from crossmae_det.utils.messages import ignore_library_warnings, list_names, shorten


def test_values_in_messages_are_cut():
    assert shorten("7") == "'7'" and shorten([1, None]) == "[1, None]"
    assert len(shorten("x" * 500)) == 80 and len(shorten("x" * 500, 20)) == 20
    assert list_names(["cat", "dog"]) == "2 (cat, dog)"
    assert list_names({name: 0 for name in "abcdefg"}.keys()) == "7 (a, b, c, d, e, ...)"


MESHGRID = (
    "torch.meshgrid: in an upcoming release, it will be required to pass the indexing argument."
)
BUFFERS = "`broadcast_buffers` is deprecated. Use `forward_sync_buffers` instead."


@pytest.mark.parametrize(
    ("message", "category", "module", "shown"),
    [
        (MESHGRID, UserWarning, "torch.functional", False),
        (BUFFERS, FutureWarning, "detectron2.engine.defaults", False),
        # The same of a user's own code, and others of the same module.
        (BUFFERS, FutureWarning, "my_project.train", True),
        ("indexing is slow", UserWarning, "torch.functional", True),
    ],
)
def test_only_warnings_of_libraries_about_their_own_code_are_ignored(
    message, category, module, shown
):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_library_warnings()
        warnings.warn_explicit(message, category, "file.py", 1, module=module)
    assert [str(warning.message) for warning in caught] == [message] * shown


def test_log_records_of_libraries_are_ignored(caplog):
    ignore_library_warnings()
    logger = logging.getLogger("torch.multiprocessing.spawn")
    logger.warning("Terminating process %d via signal %s", 1, "SIGTERM")
    logger.warning("Something else")
    assert [record.getMessage() for record in caplog.records] == ["Something else"]
