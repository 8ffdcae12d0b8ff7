"""What a simulation cannot work with."""


class SimulationInputError(ValueError):
    """A file or an option does not do; the message names it and the remedy."""
