"""Proof that long runs survive kills, full disks and damage: `make fault`, docs/reliability.md."""
