"""The texts that `fedlora deploy init` writes: readmes, and the app that a run is."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from fedlora.deploy.commands import register, run

if TYPE_CHECKING:
    from fedlora.deploy.project import FederationPlan, NodePlan

APP = """\
# The Flower app: which of fedlora's objects run, and the run's config. It carries no code.

[project]
name = "federation"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedlora"

[tool.flwr.app.components]
serverapp = "fedlora.flower.server_app:app"
clientapp = "fedlora.node_worker.node_app:app"

[tool.flwr.app.config]
config = "run.toml"
set = ""          # changes of single keys: --run-config 'set="name=second rounds=20"'
resume = false    # go on from the last checkpoint of the run of this name: --run-config resume=true
ledger-dir = ""   # of simulations: a node names its ledger itself
signature = ""    # of run.toml as it is, with `set`: fedlora deploy sign writes it
evaluate = ""     # folder of an adapter that the clients measure, without training: fedlora evaluate --federation
"""

RUN_HEAD = "# What is trained, the same for all machines; where a node's data is, its node-config.toml says.\n\n"

NODE_CONFIG_HEAD = """\
# What this node is, for its worker alone. partition-id is its number in the federation; data, device, rank and ledger
# are its own.
# test = "/path/to/file" names examples to evaluate on (evaluation.on = "clients"), in the place of a part of data.
"""


POLICY = """\
# What runs may do at this site: its own matter, whatever the coordinator asks. docs/site.md has all clauses, such as
#
#   approval = true               # each run waits for: fedlora node approve
#   private_only = true           # with epsilon = 3.0 and delta = 1e-6 over all runs
#   max_rounds = 100
#   losses = false
#
# A path on this machine can be used by a run only where it is listed.

"""


def project(plan: FederationPlan) -> str:
    """The README of the whole: what to do, in order."""
    nodes = "\n".join(f"   - nodes/{node.name}" for node in plan.nodes)
    lines = "\n".join(
        f"   FLWR_HOME=$PWD/coordinator/flower {shlex.join(register('coordinator', n.name))}" for n in plan.nodes
    )
    return f"""\
# A federation of {len(plan.nodes)} nodes at {plan.public}

1. Put authority/ca.key away; it is needed only to sign new certificates.
2. Hand each node its folder, by a way that you trust: it holds the node's key.
{nodes}
3. On the coordinator's machine: `fedlora deploy up coordinator`
4. Let the nodes in, once:
{lines}
5. On each node's machine: `fedlora deploy up FOLDER`
6. Start a run: `FLWR_HOME=$PWD/coordinator/flower {shlex.join(run("coordinator"))}`;
   how it ended: `FLWR_HOME=$PWD/coordinator/flower flwr list federation`; its files: coordinator/runs.
   After a crash, from the last checkpoint: add `--run-config resume=true`.
"""


def node(plan_of_node: NodePlan, plan: FederationPlan) -> str:
    """A node's README: three lines."""
    data = f"the file {plan_of_node.data}" if plan_of_node.data else "its share of the data that the run config names"
    return f"""\
Node {plan_of_node.name} of the federation at {plan.public}; supernode/node.key is its identity.
It trains on {data}, keeps its privacy ledger at {plan_of_node.ledger}, and opens no port to the outside.
Install fedlora, look at site/*.toml (its facts, and what you allow), then: fedlora deploy up {plan_of_node.name}
"""
