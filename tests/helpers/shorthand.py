"""Short helpers of many tests."""


def one_line(error):
    """The message of an error that pytest caught, which must be a single line."""
    message = str(error.value)
    assert "\n" not in message
    return message


def take(iterable, count):
    """The first ``count`` items of what may have no end."""
    iterator = iter(iterable)
    return [next(iterator) for _ in range(count)]
