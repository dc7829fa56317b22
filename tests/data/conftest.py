import pytest

from cnf.error import InputError


@pytest.fixture
def sentence():
    """The message of the InputError that a call raises, held to the form of a sentence."""

    def message(call, *args, words=(), **kwargs) -> str:
        with pytest.raises(InputError) as caught:
            call(*args, **kwargs)
        text = str(caught.value)
        assert text.isprintable() and ";" in text and not text.endswith(".")
        assert len(text) < 600
        assert all(word in text for word in words), text
        return text

    return message
