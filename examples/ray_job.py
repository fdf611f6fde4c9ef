"""Submit another example as a Ray job: its folder travels along, its output is printed here.

    ray start --head
    python examples/ray_job.py [--address URL] [--timeout S] [job.py --question TEXT ...]

The command line does the same:

    ray job submit --working-dir examples -- python job.py
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="of Ray's dashboard")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until it is stopped")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="an example and its options")
    args = parser.parse_args()
    command = ["python", *(args.command or ["job.py"])]

    deadline = time.monotonic() + args.timeout
    client = JobSubmissionClient(args.address)
    job = submit(client, shlex.join(command), min(deadline, time.monotonic() + 120))
    print(f"{job}: {shlex.join(command)}", flush=True)
    while (status := client.get_job_status(job)) not in ENDED:
        if time.monotonic() > deadline:
            client.stop_job(job)
            print(f"{job} was stopped after {args.timeout:g} s", file=sys.stderr)
            return 1
        time.sleep(0.5)
    print(client.get_job_logs(job), end="")
    print(f"{job}: {status.value.lower()}")
    return 0 if status == JobStatus.SUCCEEDED else 1


def submit(client: JobSubmissionClient, command: str, deadline: float) -> str:
    """Start the job; a Ray that has just been started takes some seconds until it takes one."""
    while True:
        try:
            # The job's process finds Ray by itself; what it imports comes with the folder.
            return client.submit_job(
                entrypoint=command, runtime_env={"working_dir": str(Path(__file__).parent)}
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
