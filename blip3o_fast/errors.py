"""The one error that the library tells apart from other wrong values."""


class OptionError(ValueError):
    """Options that cannot be run as given; the command line reports them with exit status 2."""
