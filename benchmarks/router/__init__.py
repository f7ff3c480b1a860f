"""What the router costs: beside no router, and beside vllm-router."""
