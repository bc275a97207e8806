"""Every error Stillroom raises on purpose.

    StillroomError
    ├── RecipeError          the recipe does not say something that can be done
    ├── SettingsError        a setting of this machine is not what it must be
    ├── SourceError          a model or a text is missing or cannot be read
    │   └── DataError        the text is there and cannot be used as the recipe asks
    ├── MismatchError        two things that must belong together do not
    ├── StoreError           the artifact store cannot be read or written
    │   ├── CorruptedError   a stored file is not the file that was stored
    │   ├── PieceGoneError   a piece of unfinished work is not kept, or no more
    │   └── StoreUnreachableError
    ├── ServiceUnreachableError   MLflow or Prefect does not answer
    ├── LoginError           MLflow or Prefect refuses the login
    └── StageError           a stage failed while it worked
        ├── NotFiniteError   NaN or infinity where a number was expected
        ├── NotPositiveDefiniteError   a Hessian that no damping makes invertible
        └── OutOfMemoryError

Each message says what was expected, what came, and what to do.
"""


class StillroomError(Exception):
    """Anything that went wrong for a reason the user can act on."""


class RecipeError(StillroomError):
    """The recipe does not describe something that can be done."""


class SettingsError(StillroomError):
    """A setting of this machine is not what it must be."""


class SourceError(StillroomError):
    """A model or a text is missing, or cannot be read."""


class DataError(SourceError):
    """A text is readable but cannot be used as the recipe asks."""


class MismatchError(StillroomError):
    """Two inputs that must belong together (tokenizer, rows, configuration) do not."""


class StoreError(StillroomError):
    """The artifact store cannot be read or written."""


class CorruptedError(StoreError):
    """The bytes of a stored file are not those that were stored."""


class PieceGoneError(StoreError):
    """A piece of unfinished work is not kept, or was forgotten while it was read."""


class StoreUnreachableError(StoreError):
    """The server that holds the artifact store does not answer."""


class ServiceUnreachableError(StillroomError):
    """MLflow or Prefect does not answer."""


class LoginError(StillroomError):
    """MLflow or Prefect refuses the login, or wants one."""


class StageError(StillroomError):
    """A stage failed while it worked."""


class NotFiniteError(StageError):
    """A NaN or an infinity came out where a number was expected."""


class NotPositiveDefiniteError(StageError):
    """A layer's Hessian cannot be inverted, with any damping that was tried."""


class OutOfMemoryError(StageError):
    """The machine ended a stage that asked for more memory than there is."""
