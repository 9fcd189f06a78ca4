"""Training speed beside another busy program (matrix products on two threads), and alone.

python benchmarks/bench_busy.py
"""

from __future__ import annotations

import os
import subprocess
import sys

from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig
from echelon.evaluation.speed import training_speed


def main() -> None:
    """Measure and print."""
    config = RunConfig(method="flat-mappo", env=WarehouseConfig(num_agents=8))
    alone = training_speed(config, updates=4, warm_up=1)[0]
    work = "import numpy as np\na = np.ones((600, 600))\nwhile True: a = a @ a * 0"
    other = subprocess.Popen([sys.executable, "-c", work], env={**os.environ, "OPENBLAS_NUM_THREADS": "2"})
    try:
        beside = [training_speed(config, updates=4, warm_up=1)[0] for _ in range(2)]
    finally:
        other.kill()
    print(f"alone {alone:,.0f} steps/s, beside another program {', '.join(f'{rate:,.0f}' for rate in beside)}")


if __name__ == "__main__":
    main()
