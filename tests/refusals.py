"""Bad input is refused in one sentence, by this project."""

import contextlib

import pytest


@contextlib.contextmanager
def refused(*words):
    """Expect a ValueError of one sentence that holds all of the words."""
    with pytest.raises(ValueError, match=r".") as caught:
        yield
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1
    assert not message.endswith(".")
    assert caught.traceback[-1].frame.f_globals["__name__"].startswith("mlspecqd_jax"), "raised by another package"
