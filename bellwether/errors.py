"""The exception tree of bellwether.

    BellwetherError
    ├── RecipeError       a recipe or an override is wrong
    ├── DataError         rows cannot be read, rendered or partitioned
    ├── ModelError        a base model or an adapter cannot be used
    │   └── NotFinite     some rows have hidden states or losses that are not finite
    ├── UpdateRejected    a client's update failed the check before aggregation
    ├── RoundFailed       a round ended below its quorum
    ├── CheckpointError   a run folder cannot be written, read or resumed
    ├── FederationError   a coordinator or a site of a real federation cannot do its part
    └── JudgeError        a language model that shall judge answers cannot be asked, or refuses
        ├── JudgeAway     it did not answer, however often it was asked; later it may
        └── JudgeRefused  it refuses one request, such as one that is too long; it may take others

Every message says what is wrong, the value, where it stands and what to do about it, in one or
two sentences that are fit to be shown to a person.
"""

_SHOWN = 10  # mistakes of a recipe


class BellwetherError(Exception):
    """The root of all errors that bellwether raises on purpose."""


class RecipeError(BellwetherError):
    """A recipe or an override is wrong; ``problems`` holds one sentence per mistake, the message the first ten."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        more = len(self.problems) - _SHOWN
        rest = [f"... and {more} more; there are {len(self.problems)} mistakes in all."] if more > 0 else []
        super().__init__("\n".join([*self.problems[:_SHOWN], *rest]))


class DataError(BellwetherError):
    """Rows cannot be read, rendered or partitioned."""


class ModelError(BellwetherError):
    """A base model or an adapter cannot be used."""


class NotFinite(ModelError):
    """Hidden states or losses of some rows are not finite."""


class UpdateRejected(BellwetherError):
    """A client's update failed the check that precedes aggregation."""


class RoundFailed(BellwetherError):
    """A round ended with fewer accepted updates than its quorum asks for."""


class CheckpointError(BellwetherError):
    """A run folder cannot be written, read or resumed."""


class FederationError(BellwetherError):
    """A coordinator or a site of a real federation cannot do its part."""


class JudgeError(BellwetherError):
    """A language model that shall judge answers cannot be asked, or refuses."""


class JudgeAway(JudgeError):
    """A judge did not answer, however often it was asked; later it may."""


class JudgeRefused(JudgeError):
    """A judge refuses one request; ``said`` holds its words, all of them."""

    def __init__(self, problem: str, said: str) -> None:
        self.said = said
        super().__init__(problem)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without its final stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
