"""The speculative loop, its cache, its sampling and its sessions."""
