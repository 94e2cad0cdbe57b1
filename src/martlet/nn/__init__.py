"""Run-time layers that techniques insert."""
