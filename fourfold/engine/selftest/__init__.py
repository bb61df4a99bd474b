"""What `fourfold selftest` checks on the user's machine, without any weights but random ones."""
