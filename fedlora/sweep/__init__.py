"""Grids of runs: `fedlora sweep`, and all of `simulations/`.

```python
from fedlora.sweep import Selection, Sweep, grid, run_sweep

settings = grid(["strategy.name=fedavg,ffa", "partition.alpha=0.1,1.0"])
rates = Selection(grid(["train.lr=0.001,0.003,0.01"]), seed=100)
outcome = run_sweep(Sweep(Path("config.toml"), Path("runs/grid"), settings, selection=rates, processes=2))
```
"""

from fedlora.sweep._grid import Settings, grid
from fedlora.sweep._sweep import Cell, Outcome, Selection, Sweep, Watcher, plan, run_sweep

__all__ = ["Cell", "Outcome", "Selection", "Settings", "Sweep", "Watcher", "grid", "plan", "run_sweep"]
