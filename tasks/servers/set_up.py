"""Set up servers that run elsewhere: `python -m tasks.servers.set_up`, as often as you like.

It makes what is missing: the bucket of STILLROOM_STORE, and on the server of PREFECT_API_URL, or
that of `make up`, the work pools, the deployments of deployments/prefect.yaml and the automations.
"""

import os
import sys

import httpx

from stillroom.errors import ServiceUnreachableError, StillroomError
from stillroom.exit_codes import ended
from stillroom.redaction import redact
from tasks.servers.services import register
from tasks.settings import Settings


def main() -> int:
    """Set everything up; return 0, 2 for an error to act on, or 3 for a defect."""
    return ended(_set_up, "error:")


def _set_up() -> int:
    settings = Settings()
    environment = os.environ | settings.environment()
    api = environment.get("PREFECT_API_URL")
    if not api:
        raise StillroomError(
            "no server is there to set up: PREFECT_API_URL says where one is, such as "
            "http://prefect:4200/api, or `make up` starts one here"
        )
    if settings.store_url.startswith("s3://"):
        _make_bucket(settings.store_url.removeprefix("s3://").partition("/")[0])
    try:
        register(api, environment)
    except httpx.HTTPError as error:
        said = " ".join(redact(str(error)).split())
        raise ServiceUnreachableError(
            f"Prefect at {redact(api)} was not set up ({said}); see "
            "whether it runs, and whether PREFECT_API_AUTH_STRING is its USER:PASSWORD"
        ) from error
    print("the work pools, the deployments and the automations are there")
    return 0


def _make_bucket(bucket: str) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    from tasks.store.s3_client import explain, s3_client

    client = s3_client()
    try:
        if bucket not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=bucket)
            print(f"made the bucket {bucket}")
    except (BotoCoreError, ClientError) as error:
        raise explain(error, f"s3://{bucket}", str(client.meta.endpoint_url)) from error


if __name__ == "__main__":
    sys.exit(main())
