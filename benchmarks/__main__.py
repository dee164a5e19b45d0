"""``python -m benchmarks {backbones,ecoformer,kernels,memory,metrics,temporal}``: measurements here, beside peers."""

import argparse
import sys
from collections.abc import Sequence

from benchmarks import backbones, ecoformer, kernels, memory, metrics, temporal

BENCHMARKS = {
    "backbones": backbones,
    "ecoformer": ecoformer,
    "kernels": kernels,
    "memory": memory,
    "metrics": metrics,
    "temporal": temporal,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; 2 and one line on stderr for options it cannot run with."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, benchmark in BENCHMARKS.items():
        benchmark.add_arguments(commands.add_parser(name, help=benchmark.__doc__))
    arguments = parser.parse_args(argv)
    try:
        BENCHMARKS[arguments.command].run(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
