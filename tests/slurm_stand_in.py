"""srun and scontrol as configs/slurm/stage.slurm calls them: under either name, two tasks on this machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

NAME, WORDS = Path(sys.argv[0]).name, sys.argv[1:]

if NAME == "scontrol":
    if WORDS[:2] == ["show", "hostnames"]:
        print("127.0.0.1")
    else:
        with open("requeued", "a", encoding="utf-8") as file:
            print(*WORDS, file=file)
else:
    assert WORDS[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=1"]
    ranks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NTASKS": "2"} for i in range(2)]
    tasks = [subprocess.Popen(WORDS[2:], env=os.environ | rank) for rank in ranks]
    while None in (codes := [task.poll() for task in tasks]):
        if any(codes):  # one failed: the others are told to end
            for task in tasks:
                task.terminate()
        time.sleep(0.1)
    sys.exit(max(128 - code if code < 0 else code for code in codes))
