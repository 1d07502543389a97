"""The backbone both stages import: the contract on disk and the tools that read it."""
