"""`nixl-async bench serve`: prefill and decode processes serve requests; compute is simulated, every byte moves and is checked.

What is simulated is `computing`, when what comes is `arrivals`; what happens to a request is in `prefill` and `decode`.
"""
