"""Flower's own simulation on Ray: a ClientApp with a plain torch loop, as its templates for PEFT have it.

Started by peers.py: `python peer_flower.py FOLDER CLIENTS RAY_FOLDER`. The server's part is as lean as it can be: it
polls for replies and keeps their mean.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    import peer_client as client
    from peft import set_peft_model_state_dict

    asked: Any = message.content.config_records["asked"]
    torch.set_num_threads(1)
    load = client.cached if asked["cached"] else client.build
    model = load(asked["folder"], asked["dtype"])
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    number = int(context.node_config["partition-id"])
    client.train(model, asked["folder"], asked["round"], number)
    return Message(RecordDict({"arrays": ArrayRecord(client.tensors(model))}), reply_to=message)


def play(grid: Grid, folder: str, start: dict[str, torch.Tensor], turn: dict[str, Any]) -> None:
    """The rounds of one turn, each from the mean of the last; a turn starts anew."""
    from safetensors.torch import save_file

    state = start
    for number in range(1, turn["rounds"] + 1):
        asked = {"folder": folder, "round": number, "cached": turn["cached"], "dtype": turn["dtype"]}
        content = RecordDict({"arrays": ArrayRecord(state), "asked": ConfigRecord(asked)})
        waiting = set(grid.push_messages([Message(content, node, "train") for node in grid.get_node_ids()]))
        total, answered = {name: torch.zeros_like(value) for name, value in state.items()}, 0
        while waiting:
            for reply in grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                for name, value in reply.content.array_records["arrays"].to_torch_state_dict().items():
                    total[name] += value
                answered += 1
            time.sleep(0.002)
        state = {name: value / answered for name, value in total.items()}
    if turn.get("save"):
        save_file(state, turn["save"])


def main() -> None:
    """Answer the benchmark's turns."""
    import json

    import peer_flower  # this file as a module: Ray sends functions of a module by their names
    from flwr.simulation import run_simulation
    from peer_client import turns
    from safetensors.torch import load_file

    folder, clients, place = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    adapter = Path(json.loads((Path(folder) / "peer.json").read_text())["adapter"])
    start = load_file(adapter / "adapter_model.safetensors")
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:  # noqa: ARG001
        while len(list(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        for turn in turns():
            play(grid, folder, start, turn)

    ray = {
        "num_cpus": 2,
        "object_store_memory": 100_000_000,
        "include_dashboard": False,
        "log_to_driver": False,
        "_temp_dir": place,
    }
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server, peer_flower.app, clients, backend_config={"init_args": ray, "client_resources": resources})


if __name__ == "__main__":
    main()
