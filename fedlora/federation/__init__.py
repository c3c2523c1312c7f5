"""The round: what a server plans, asks and aggregates, and what a client does with it; nothing here imports Flower."""
