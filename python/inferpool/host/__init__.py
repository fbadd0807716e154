"""The host's side: pools, roles, and the workers behind them."""
