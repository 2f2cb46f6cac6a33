"""What the tensors of an update are called, in a state dict and in a native file."""

BRANCHES = "lora_branches"  # the name under which a layer holds its soft updates
LOW_RANK = ("lora_A", "lora_B", "lora_scale")
WHOLE = "lora_whole"
