"""Checks the HTTP interface of this container; exits with 0 for a 2xx answer: `healthcheck.py PORT PATH`.

It uses `http.client` only, because the images have no curl and the check runs every few seconds.
"""

import http.client
import sys

TIMEOUT_S = 15.0


def check(port: int, path: str) -> str | None:
    """The problem with this container's health, or None."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(500).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"no answer on port {port} ({type(error).__name__}: {error})"
    finally:
        connection.close()
    return None if 200 <= answer.status < 300 else f"{path} answers {answer.status}: {body}"


if __name__ == "__main__":
    problem = check(int(sys.argv[1]), sys.argv[2])
    if problem:
        # `docker inspect` shows the output of the last health checks.
        sys.stdout.write(problem + "\n")
        sys.exit(1)
