"""Kills a run of two processes at random moments and shows that nothing is lost.

python tests/chaos.py --kills 20

SIGKILL is sent to one process, or to torchrun and both processes, at a random moment after a new
checkpoint; then the same command is run again. In the end weights, queue, optimizer and log must be
bitwise equal to those of an undisturbed run. The exit code is 1 if they are not.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import LAUNCH, begin, checkpoint, records, states_equal


def start(output, epochs):
    command = [*LAUNCH, "train.py", "--epochs", epochs, "--save-minutes", 0.005, "--output", output]
    return begin(*command, stderr=subprocess.DEVNULL, start_new_session=True)


def steps_done(output):
    """The step of the last checkpoint; reading it also shows that it is intact."""
    return checkpoint(output)["step"] if (output / "checkpoint.pth").exists() else 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of the run (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        calm, disturbed = Path(directory) / "calm", Path(directory) / "disturbed"
        if start(calm, args.epochs).wait() != 0:
            sys.exit("the undisturbed run failed")
        for kill in range(1, args.kills + 1):
            before, process = steps_done(disturbed), start(disturbed, args.epochs)
            while steps_done(disturbed) == before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 2))
            found = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True)
            ranks = list(map(int, found.split()))
            victims = [moments.choice(ranks)] if moments.random() < 0.5 else [process.pid, *ranks]
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            process.wait()  # if one process was killed, torchrun ends the other
            after = steps_done(disturbed)
            print(f"kill {kill} of {len(victims)} processes: step {before} to {after}", flush=True)
            if after < before:
                sys.exit("steps of a saved checkpoint were lost")
        if start(disturbed, args.epochs).wait() != 0:
            sys.exit("the last run failed")
        ends = [(records(output)[1], checkpoint(output)) for output in (calm, disturbed)]
        same = states_equal(*ends)
        print(f"{args.kills} kills: {'nothing was lost' if same else 'THE RESULTS DIFFER'}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
