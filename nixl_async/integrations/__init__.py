"""Plug-ins for systems that serve models: each module here is for one of them, and imports it.

They use the public asyncio API alone. `README.md` says which version of each system was tried, and how it is switched on.
"""
