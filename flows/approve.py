"""The command `approve`: answer for a registered version, where no suspended run is to be resumed.

It reads the question from MLflow alone, so it works wherever the tracking server is reached.
"""

import argparse
import getpass
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def add_approve_command(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add `approve` to a command line."""
    approve = subparsers.add_parser(
        "approve", help="let the alias move to a version that waits for it, or refuse"
    )
    approve.add_argument("reference", help="models:/NAME/VERSION, as the run said it")
    approve.add_argument("--comment", default="", help="why; kept with the registered versions")
    approve.add_argument("--refuse", action="store_true", help="the alias stays where it is")
    approve.add_argument("--show", action="store_true", help="show the table, and answer nothing")
    approve.set_defaults(run=run_approve)


def run_approve(options: argparse.Namespace) -> int:
    """Show what was measured, record the answer and move the alias; return the exit code.

    Raises:
        SourceError: there is no such version.
        MismatchError: it cannot be approved; the message says why.
        ServiceUnreachableError: MLflow does not answer.
    """
    from tasks.approval import Answer, pending_question, settle
    from tasks.settings import Settings
    from tasks.tracking import connect

    client = connect(Settings().tracking_uri)
    question = pending_question(client, options.reference)
    print(f"{_table(client, question.run_id)}\n\n{question.sentence}")
    if options.show:
        return 0
    answer = Answer(not options.refuse, options.comment.strip(), _user(), datetime.now(UTC))
    settle(client, question, answer)
    print(f"{', '.join(question.versions)}: {answer.sentence}")
    print(f"@{question.alias} {'moved' if answer.approve else 'stays where it is'}")
    return 0


def _table(client: Any, run_id: str) -> str:
    """Return the table and the gates of the run that asked, or why they cannot be shown here."""
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException

    from stillroom.evaluation.report_data import ReportData
    from stillroom.evaluation.tables import render_table
    from stillroom.pull import reaching
    from stillroom.redaction import redact

    try:
        with tempfile.TemporaryDirectory(prefix="stillroom-") as scratch:
            with reaching(client.tracking_uri):
                file = client.download_artifacts(run_id, "report.json", scratch)
            data = ReportData.from_json(Path(file).read_text())
    except (MlflowException, OSError, ValueError, BotoCoreError, ClientError) as error:
        said = " ".join(redact(str(error)).split())[:200]
        return f"the table of MLflow's run {run_id} cannot be read from here: {said}"
    gates = "\n".join(gate.sentence for gate in data.gates)
    return f"{render_table(data)}\n\n{gates}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        return f"user {os.getuid()}"
