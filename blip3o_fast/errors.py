"""The errors that the library tells apart from other wrong values."""


class OptionError(ValueError):
    """Options that cannot be run as given; the command line reports them with exit status 2."""


class NonFiniteSamples(ValueError):
    """A sampler left the range of its dtype.

    Attributes:
        samples: positions in the batch, from 0.
    """

    def __init__(self, message: str, samples: tuple[int, ...]) -> None:
        super().__init__(message)
        self.samples = samples
