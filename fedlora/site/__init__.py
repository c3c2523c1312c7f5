"""What a site decides about its own machine, whatever the coordinator asks.

A site's folder belongs to the user of its worker (`fedlora worker --site DIR`):

```
policy.toml        what runs may do here: `fedlora.site.policy`
node-config.toml   the node's own facts: its data file, number, device, rank, ledger
asked/HASH.toml    configs of runs that wait for an approval
audit.jsonl        what was asked and answered: `fedlora.site.audit_log`
approved/HASH.toml configs that may run: `fedlora node approve`
```
"""

NODE_CONFIG = "node-config.toml"
"""Name of the file with a node's own facts, in its site's folder."""
