"""`python -m services NAME`: runs one service until it is stopped."""

import argparse
import importlib.util

from services import SERVICES


def main() -> None:
    """Run the service that the command line names."""
    width = max(map(len, SERVICES))
    listed = "\n".join(f"  {name:{width}}  {service.description}" for name, service in SERVICES.items())
    parser = argparse.ArgumentParser(
        prog="python -m services",
        description="Run one service until SIGINT or SIGTERM. Its configuration comes from the environment (SPROUT_*).",
        epilog=f"services:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("service", metavar="NAME", help="the service to run")
    name = parser.parse_args().service.replace("-", "_")
    if name not in SERVICES:
        parser.error(f"no service {name!r}; there are: {', '.join(SERVICES)}")
    if importlib.util.find_spec(f"services.{name}") is None:
        parser.error(f"service {name!r} is not installed here; an image contains one service only")
    SERVICES[name].load().main()


if __name__ == "__main__":
    main()
