"""How a command ends: with a line for what its user can mend, and with all of it for a defect."""

import sys
import traceback
from collections.abc import Callable

from stillroom.errors import StillroomError
from stillroom.redaction import redact

REFUSED = 1
"""A gate or a person refused, or a store is not sound."""
ACTIONABLE = 2
DEFECT = 3


def ended(work: Callable[[], int], says: str, *actionable: type[Exception]) -> int:
    """Do the work of a command and return its exit code; what went wrong is printed, no secrets.

    Args:
        work: returns 0, or another code of its own.
        says: with what the line of an error begins.
        actionable: errors besides Stillroom's own of which one line tells enough.
    """
    expected: tuple[type[Exception], ...] = (StillroomError, *actionable)
    try:
        return work()
    except expected as error:
        # One line, whatever a library has put into it.
        print(says, " ".join(redact(str(error)).split()), file=sys.stderr)
        return ACTIONABLE
    except Exception:
        print(redact(traceback.format_exc()), file=sys.stderr)
        return DEFECT
