"""What serves experts, in a node or in the coordinator's own process (`local`)."""
