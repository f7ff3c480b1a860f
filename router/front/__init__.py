"""What clients and operators see: the two HTTP ports."""
