"""Run the jobs of a folder on the GPUs of one machine until a deadline.

    python scripts/offline/jobs.py JOBS --logs LOGS --ready READY --until SECONDS

A job is a shell script in JOBS. All GPUs share one list, in the order of the names: a GPU that is free takes the first
job that can run. Comments in a script say what the job needs:

    # seconds: 400     the job is left out if less time is left
    # needs: data te   files in READY that must be there before it starts
    # turn             it waits for its turn itself, with `train.py --turn $TURN`
    # beside           it waits for no turn, and slows down the job that runs beside it
    # each: a b        the script is a job for each of these words, and gets the word as its first argument

A job with `turn` starts while another job runs, and so loads everything before its turn comes. It starts only when that
job has its own turn, and so cannot overtake it.

A job finds its GPU in CUDA_VISIBLE_DEVICES and the file of its turn in TURN. UNTIL is a time 40 seconds before the
deadline, at which the training of a job has to end. Before the deadline, jobs that still run are ended. The output of a
job goes to LOGS/NAME.log. NAME is that of the script, with the word that it gets.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

# A job gets a signal so many seconds before the deadline, and is killed after half of them. torchrun needs the time to
# end its ranks.
GRACE = 10
# A training ends so many seconds before the deadline, so that there is time for what follows it.
ROOM = 40


@dataclasses.dataclass(frozen=True)
class Job:
    """A script with what its comments say."""

    path: Path
    seconds: float
    needs: tuple[str, ...]
    turn: bool
    beside: bool
    word: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.path.stem, self.word)))

    @classmethod
    def read(cls, path: Path) -> list["Job"]:
        """Read the comments of a script, and return its jobs.

        Raises:
            ValueError: the script does not say how many seconds it takes.
        """
        text = path.read_text()
        seconds = re.search(r"^# seconds: *([\d.]+)$", text, re.M)
        if not seconds:
            raise ValueError(f"{path} does not say how long it takes: add a line such as '# seconds: 300'")
        needs = re.search(r"^# needs: *(.*)$", text, re.M)
        turn, beside = (bool(re.search(rf"^# {word}$", text, re.M)) for word in ("turn", "beside"))
        each = re.search(r"^# each: *(.*)$", text, re.M)
        of_all = path, float(seconds[1]), tuple(needs[1].split()) if needs else (), turn, beside
        return [cls(*of_all, word) for word in (each[1].split() if each else [""])]


def choose(jobs: list[Job], ready: set[str], left: float, busy: float | None) -> Job | None:
    """Return the job that a GPU starts next, or None if it has to wait.

    Args:
        jobs: the jobs that nobody has started, in their order.
        ready: the names in READY.
        left: seconds until the deadline.
        busy: seconds for which the GPU's present job may still run, or None if it runs no job.
    """
    for job in jobs:
        waits = 0 if job.beside else busy or 0
        if set(job.needs) <= ready and waits + job.seconds <= left:
            # any other job would disturb the one that runs
            return job if busy is None or job.turn or job.beside else None
    return None


def is_locked(path: Path) -> bool:
    """Return whether a process has the lock of `flock` on a file."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Machine:
    """The GPUs of a machine, with two jobs on each at most: one runs, and one runs beside it or waits for its turn."""

    def __init__(self, folder: Path, logs: Path, ready: Path, until: float):
        self.jobs = [job for path in sorted(folder.glob("*.sh")) for job in Job.read(path)]
        self.logs, self.ready, self.until, self.start = logs, ready, until, time.time()
        self.running: dict[str, dict[Job, float]] = {}
        self.lock = threading.Lock()

    def say(self, text: str):
        print(f"{time.time() - self.start:6.0f} s  {text}", flush=True)

    def turn(self, gpu: str) -> Path:
        """Return the file that the running job of a GPU has locked."""
        return self.logs / f"turn.{gpu}"

    def take(self, gpu: str) -> Job | None:
        """Take the next job of a GPU from the list."""
        with self.lock:
            now, running = time.time(), self.running[gpu]
            if len(running) > 1:
                return None
            busy = sum(max(0.0, job.seconds - (now - begun)) for job, begun in running.items()) if running else None
            if any(not job.beside for job in running) and not is_locked(self.turn(gpu)):
                return None
            job = choose(self.jobs, {path.name for path in self.ready.iterdir()}, self.until - now, busy)
            if job:
                self.jobs.remove(job)
                running[job] = now
            return job

    def work(self, gpu: str):
        """Run jobs on a GPU until none is left that fits into the time."""
        self.running[gpu] = {}
        threads: list[threading.Thread] = []
        while self.running[gpu] or any(job.seconds <= self.until - time.time() for job in self.jobs):
            job = self.take(gpu)
            if job:
                threads.append(threading.Thread(target=self.run, args=(job, gpu)))
                threads[-1].start()
            time.sleep(0.5)
        for thread in threads:
            thread.join()

    def run(self, job: Job, gpu: str):
        """Run a job on a GPU and report how it ended."""
        self.say(f"{job.name} starts on GPU {gpu}")
        turn = self.turn(gpu)
        # flock is the same lock that train.py takes
        locked = [] if job.turn or job.beside else ["flock", str(turn)]
        command = [*locked, "bash", str(job.path), job.word]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "TURN": str(turn), "UNTIL": str(self.until - ROOM)}
        with open(self.logs / f"{job.name}.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
            code = self._end_of(process)
        with self.lock:
            del self.running[gpu][job]
            for other in self.running[gpu]:
                if not (job.beside or other.beside):
                    # it has waited for its turn until now
                    self.running[gpu][other] = time.time()
        self.say(f"{job.name} ends with status {code}")

    def _end_of(self, process: subprocess.Popen) -> int:
        """Wait for the end of a process, or end it and all of its group before the deadline, and return its status."""
        try:
            return process.wait(max(0.1, self.until - GRACE - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(GRACE / 2)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path, help="folder of the scripts")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the output of the jobs")
    parser.add_argument("--ready", type=Path, required=True, help="folder of the files that jobs need")
    parser.add_argument("--until", type=float, required=True, help="the deadline, in seconds since 1970")
    parser.add_argument("--gpus", nargs="+", default=["0"], help="numbers of the GPUs")
    args = parser.parse_args()
    for folder in (args.logs, args.ready):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        machine = Machine(args.jobs, args.logs, args.ready, args.until)
    except ValueError as error:
        parser.error(str(error))
    threads = [threading.Thread(target=machine.work, args=(gpu,)) for gpu in args.gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    machine.say("no job is left that fits: " + (", ".join(job.name for job in machine.jobs) or "all have run"))


if __name__ == "__main__":
    main()
